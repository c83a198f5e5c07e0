"""A rank of a vision pipeline: `python -m bireme.vision.worker SOCKET_FD SPANS_FD`."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import torch
from torch import nn

from bireme.engine import rank
from bireme.engine.messages import Join, Leave
from bireme.errors import EngineError
from bireme.parallel.collectives import Communicator
from bireme.parallel.pipeline import Action
from bireme.trace import SpanKind, SpanRing
from bireme.vision.cut_points import BlockShape
from bireme.vision.messages import VISION, Load, Loaded, Logits, Measure, Measured, Run
from bireme.vision.model import VisionModel
from bireme.vision.tracing import Traced, num_bytes, trace
from bireme.vision.weights import materialise, open_weights


class Stage:
    """The blocks of one rank, and what they are given."""

    def __init__(
        self,
        blocks: list[nn.Module],
        given: BlockShape | None,
        images: torch.Tensor | None,
        dtype: torch.dtype,
        comm: Communicator,
        device: torch.device,
        spans: SpanRing,
    ) -> None:
        self._blocks, self._given, self._images, self._dtype = blocks, given, images, dtype
        self._comm, self._device, self._spans = comm, device, spans

    def run(self, command: Run) -> torch.Tensor | None:
        """The logits [batch, classes] where this is the last stage."""
        outs, mesh = {}, self._comm.mesh
        for text in command.schedule[mesh.rank]:
            action = Action.parse(text)
            if action.stage != mesh.stage:
                raise EngineError(f"{action} was given to a rank of stage {mesh.stage}")
            out = self._execute(action, command)
            if mesh.is_last_stage:
                outs[action.micro_batch] = out
        return torch.cat([outs[index] for index in sorted(outs)]) if outs else None

    def _execute(self, action: Action, command: Run) -> torch.Tensor:
        step_id = command.first_step + action.micro_batch
        self._spans.set_step(step_id, 0)
        with self._spans.span(SpanKind.STEP):
            x = self._input(action.micro_batch, command, step_id)
            with self._spans.span(SpanKind.COMPUTE):
                for block in self._blocks:
                    x = block(x)
                _synchronise(self._device)
            if not self._comm.mesh.is_last_stage:
                self._comm.hidden_sender.send((0, step_id), x)
        return x

    def _input(self, micro_batch: int, command: Run, step_id: int) -> torch.Tensor:
        size = command.sizes[micro_batch]
        if self._images is not None:
            start = command.first_image + sum(command.sizes[:micro_batch])
            return self._images[start : start + size].to(self._device, self._dtype)
        receiver, given = self._comm.hidden_receiver, self._given
        assert receiver is not None
        assert given is not None
        x = receiver.receive((0, step_id), (size, *given.out_shape), given.out_dtype, self._device)
        if self._device.type == "cuda":  # NCCL's wait is the stream's, and the span above a launch
            with self._spans.span(SpanKind.RECV):
                _synchronise(self._device)
        return x

    def drain(self) -> None:
        self._comm.hidden_sender.drain()


class VisionRank(rank.Rank[rank.Commands]):
    """Keeps the last model's trace: one rank measures, runs alone, and then as a stage."""

    def __init__(self, spans: SpanRing, commands: rank.Commands) -> None:
        super().__init__(spans, commands)
        self._stage: Stage | None = None
        self._traced: tuple[VisionModel, nn.Module, Traced] | None = None

    @torch.inference_mode()
    def handle(self, command: msgspec.Struct) -> msgspec.Struct | None:
        match command:
            case Join():
                return self.join(command)
            case Measure():
                return self._measure(command)
            case Load():
                return self._load(command)
            case Run():
                return self._run(command)
            case Leave():
                return self.leave()
        raise EngineError(f"a rank of a pipeline was told {type(command).__name__}")

    def drop(self, *, is_orderly: bool) -> None:
        stage, self._stage = self._stage, None
        if stage is not None and is_orderly:
            stage.drain()

    def _trace(self, model: VisionModel) -> tuple[nn.Module, Traced]:
        if self._traced is None or self._traced[0] != model:
            module = model.build()
            self._traced = model, module, trace(module, model.image_shape, model.torch_dtype)
        return self._traced[1:]

    def _measure(self, command: Measure) -> Measured:
        module, traced = self._trace(command.model)
        weights = open_weights(command.model, module)
        shape = command.micro_batch, *command.model.image_shape
        x = torch.randn(shape, device=self._device).to(command.model.torch_dtype)
        found = Measured([], [])
        for block in traced.blocks:
            compute = partial(materialise(block.module, weights, self._device), x)
            x = compute()
            found.compute_s.append(self._seconds(compute, command.repeats))
            found.transfer_s.append(self._seconds(x.clone, command.repeats))
        return found

    def _seconds(self, work: Callable[[], object], repeats: int) -> float:
        """The least of several, as what else runs on the device only adds."""
        taken = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            _synchronise(self._device)
            taken.append(time.perf_counter() - start)
        return min(taken)

    def _load(self, command: Load) -> Loaded:
        if self._comm is None:
            raise EngineError("a model came before a world was joined")
        module, traced = self._trace(command.model)
        stage = self._comm.mesh.stage
        first = sum(command.blocks_per_stage[:stage])
        last = first + command.blocks_per_stage[stage]
        with self._spans.span(SpanKind.LOAD):
            weights = open_weights(command.model, module)
            blocks = [
                materialise(block.module, weights, self._device)
                for block in traced.blocks[first:last]
            ]
            images = self._images(command) if stage == 0 else None
        given = traced.blocks[first - 1].shape if first else None
        dtype = command.model.torch_dtype
        self._stage = Stage(blocks, given, images, dtype, self._comm, self._device, self._spans)
        self._spans.set_step(0, 0)  # not begun: what the ring says of an earlier world is over
        return Loaded(sum(map(num_bytes, blocks)))

    def _images(self, command: Load) -> torch.Tensor:
        shape = command.num_images, *command.model.image_shape
        with Path(command.images_path).open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)  # shared: what is written later shows
        images = torch.frombuffer(mapped, dtype=torch.float32).view(shape)
        if command.is_live:
            return images
        return images.to(self._device, command.model.torch_dtype, copy=True)

    def _run(self, command: Run) -> Logits | None:
        if self._stage is None:
            raise EngineError("images came before a model was loaded")
        logits = self._stage.run(command)
        if logits is None:
            return None
        values = logits.float().cpu().contiguous()
        return Logits(values.shape[1], values.numpy().tobytes())


def _synchronise(device: torch.device) -> None:
    """Spans are of the host's clock: what they measure must have happened."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def main() -> None:
    rank.serve(VISION, VisionRank, rank.Commands(VISION))


if __name__ == "__main__":
    main()
