"""A rank of a vision pipeline: `python -m bireme.vision.worker SOCKET_FD SPANS_FD`."""

from __future__ import annotations

import copy
import mmap
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import torch
from torch import fx, nn

from bireme.engine import rank
from bireme.engine.messages import Done, RankUsage, ReadUsage
from bireme.engine.rank_memory import reset_peak, usage
from bireme.errors import EngineError
from bireme.trace import SpanKind, SpanRing
from bireme.vision.fusing import fuse
from bireme.vision.messages import VISION, Load, Loaded, Logits, Measure, Measured, Run
from bireme.vision.model import VisionModel
from bireme.vision.stage import Stage, make_forward
from bireme.vision.tracing import Traced, num_bytes, trace
from bireme.vision.weights import materialise, open_weights

_IN_A_ROW = 8  # for a launch and its end take as long as a block


class _Row(nn.Module):
    """A block again and again, each with weights of its own, which no cache holds."""

    def __init__(self, block: nn.Module, length: int) -> None:
        super().__init__()
        self.length = length
        self._blocks = [block, *(copy.deepcopy(block) for _ in range(length - 1))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = [block(x) for block in self._blocks]
        last: torch.Tensor = made[-1]
        return last


class VisionRank(rank.Rank[rank.Commands]):
    """Keeps the last model's trace: one rank measures, runs alone, and then as a stage."""

    def __init__(
        self,
        spans: SpanRing,
        commands: rank.Commands,
        answer: Callable[[msgspec.Struct], None],
    ) -> None:
        super().__init__(spans, commands, answer)
        self._stage: Stage | None = None
        self._weights: list[torch.Tensor] = []  # as it runs
        self._is_live = False
        self._traced: tuple[VisionModel, nn.Module, Traced] | None = None

    @torch.inference_mode()
    def handle(self, command: msgspec.Struct) -> msgspec.Struct | None:
        match command:
            case Measure():
                return self._measure(command)
            case Load():
                return self._load(command)
            case Run():
                return self._run(command)
            case ReadUsage():
                return self._usage()
        raise EngineError(f"a rank of a pipeline was told {type(command).__name__}")

    def drop(self, *, is_orderly: bool) -> None:
        stage, self._stage, self._weights = self._stage, None, []
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
        x = self._empty(command.micro_batch, *traced.given_to(0)).normal_()
        found = Measured([], [])
        for block in traced.blocks:
            made = _fused(materialise(block.module, weights, self._device), x)
            row = _Row(made, _IN_A_ROW if self._device.type == "cuda" else 1)
            compute = partial(make_forward([row], self._device, is_captured=command.is_captured), x)
            x = compute()
            found.compute_s.append(self._seconds(compute, command.repeats) / row.length)
            found.transfer_s.append(self._seconds(x.clone, command.repeats))
        return found

    def _empty(self, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Channels last, which convolutions are faster on."""
        made = torch.empty(count, *shape, device=self._device, dtype=dtype)
        return made.to(memory_format=torch.channels_last) if made.dim() == 4 else made

    def _seconds(self, work: Callable[[], object], repeats: int) -> float:
        """The least of several, as what else runs on the device only adds."""
        taken = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
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
            blocks, weight_bytes = [], 0
            for index in range(first, last):
                filled = materialise(traced.blocks[index].module, weights, self._device)
                weight_bytes += num_bytes(filled)
                blocks.append(_fused(filled, self._empty(2, *traced.given_to(index))))
            images = self._images(command) if stage == 0 else None
        forward = make_forward(blocks, self._device, is_captured=command.is_captured)
        given = traced.given_to(first)
        self._weights = [it for block in blocks for it in (*block.parameters(), *block.buffers())]
        self._is_live = command.is_live
        self._stage = Stage(forward, given, images, self._comm, self._device, self._spans)
        self._spans.set_step(0, 0)  # not begun: what the ring says of an earlier world is over
        return Loaded(weight_bytes)

    def _usage(self) -> RankUsage:
        """Its peak is since the last time that this was asked, if ever."""
        self.finish_spans()
        found = usage(self._device, self._weights, (), self.communication_bytes)
        reset_peak(self._device)
        return found

    def _images(self, command: Load) -> torch.Tensor:
        shape = command.num_images, *command.model.image_shape
        with Path(command.images_path).open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)  # shared: what is written later shows
        images = torch.frombuffer(mapped, dtype=torch.float32).view(shape)
        if command.is_live:
            return images
        return images.to(
            self._device,
            command.model.torch_dtype,
            copy=True,
            memory_format=torch.channels_last,
        )

    def _run(self, command: Run) -> Logits | Done | None:
        if self._stage is None:
            raise EngineError("images came before a model was loaded")
        logits = self._stage.run(command)
        if logits is None and self._is_live:
            return None  # nobody waits for this stage, nor it for its device
        self.finish_spans()
        self._stage.finish()
        if logits is None:
            return Done()
        values = logits.float().cpu().contiguous()
        return Logits(values.shape[1], values.numpy().tobytes())


def _fused(block: fx.GraphModule, example: torch.Tensor) -> nn.Module:
    """As it runs, of a block with its weights; `example` is what it is given."""
    made = fuse(block, example)
    for weight in made.parameters():
        if weight.dim() == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return made


def main() -> None:
    rank.serve(VISION, VisionRank, rank.Commands(VISION))


if __name__ == "__main__":
    main()
