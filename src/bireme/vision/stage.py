"""A stage of a vision model: its blocks, what it is given, and how it passes a batch on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from bireme.errors import EngineError
from bireme.parallel.collectives import Communicator
from bireme.parallel.pipeline import Action
from bireme.trace import SpanKind, SpanWriter
from bireme.vision.messages import Run

Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    given: torch.Tensor
    made: torch.Tensor


@dataclass(frozen=True)
class Captured:
    """The same as a CUDA graph for each shape that comes, all in one pool of memory: the host launches once
    where it would launch hundreds of kernels."""

    forward: Forward
    _graphs: dict[torch.Size, _Graph] = field(default_factory=dict)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        found = self._graphs.get(x.shape)
        if found is None:
            found = self._graphs[x.shape] = self._capture(x)
        found.given.copy_(x)
        found.graph.replay()
        return found.made.clone()

    def _capture(self, x: torch.Tensor) -> _Graph:
        given = x.clone()
        aside = torch.cuda.Stream(x.device)
        aside.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(aside):
            self.forward(given)  # libraries make their plans, which cannot be captured
        torch.cuda.current_stream(x.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        pool = next((it.graph.pool() for it in self._graphs.values()), None)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")  # of a view alone
            # torch's own stream would be of the device that was captured on first
            with torch.cuda.graph(
                graph, pool=pool, stream=aside, capture_error_mode="thread_local"
            ):
                made = self.forward(given)
        return _Graph(graph, given, made)


def make_forward(
    blocks: Sequence[nn.Module], device: torch.device, *, is_captured: bool
) -> Forward:
    """Of blocks on their device; `is_captured` makes no difference to a CPU."""
    forward = nn.Sequential(*blocks)
    return Captured(forward) if is_captured and device.type == "cuda" else forward


class Stage:
    """The blocks of one rank, and what they are given."""

    def __init__(
        self,
        forward: Forward,
        given: tuple[tuple[int, ...], torch.dtype],
        images: torch.Tensor | None,
        comm: Communicator,
        device: torch.device,
        spans: SpanWriter,
    ) -> None:
        self._forward, self._given, self._images = forward, given, images
        self._comm, self._device, self._spans = comm, device, spans

    def run(self, command: Run) -> torch.Tensor | None:
        """The logits [images, classes] where this is the last stage."""
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
        header = 0, command.first_step + action.micro_batch
        self._spans.set_step(header[1], header[0])
        with self._spans.span(SpanKind.STEP):
            x = self._input(action.micro_batch, command)
            with self._spans.span(SpanKind.COMPUTE):
                x = self._forward(x)
            if not self._comm.mesh.is_last_stage:
                self._comm.hidden_sender.send(header, _channels_last(x))
        return x

    def _input(self, micro_batch: int, command: Run) -> torch.Tensor:
        size, (shape, dtype) = command.sizes[micro_batch], self._given
        if self._images is not None:
            first = command.first_image + sum(command.sizes[:micro_batch])
            start = first % len(self._images)
            images = self._images[start : start + size]
            # a copy: a module may change what it is given
            return images.to(self._device, dtype, memory_format=torch.channels_last, copy=True)
        receiver = self._comm.hidden_receiver
        assert receiver is not None
        # activations [C, H, W] come as [N, H, W, C]
        rows = (*shape[1:], shape[0]) if len(shape) == 3 else shape
        header = 0, command.first_step + micro_batch
        x = receiver.receive(header, (size, *rows), dtype, self._device)
        return x.permute(0, 3, 1, 2) if x.dim() == 4 else x

    def finish(self) -> None:
        """EngineError where the last of what came was not what it should have been."""
        if self._comm.hidden_receiver is not None:
            self._comm.hidden_receiver.finish()

    def drain(self) -> None:
        self._comm.hidden_sender.drain()


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] as [N, H, W, C], which is how convolutions leave it in memory."""
    return x.permute(0, 2, 3, 1) if x.dim() == 4 else x
