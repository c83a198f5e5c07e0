"""Steps in which every sequence has one new token, as CUDA graphs: one launch where there were hundreds.

A graph is of a number of rows; a step takes the next larger one, and fills it up with rows of no request.
What changes between steps lies on the device: ids, positions, block tables.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from bireme.engine.sampling.sampler import Chosen, Sampler
from bireme.engine.slots import Slots
from bireme.kernels.device_spans import CapturedSpans, DeviceSpans
from bireme.models.blocks import StageModel
from bireme.request import ScheduledBatch

T = TypeVar("T")
_SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
_LARGEST_STRIDE = 128  # between the sizes beyond


def graph_sizes(most: int) -> tuple[int, ...]:
    """Rows that graphs are captured for, up to `most`."""
    beyond = range(_SIZES[-1] + _LARGEST_STRIDE, most, _LARGEST_STRIDE)
    return (*(size for size in (*_SIZES, *beyond) if size < most), most)


@dataclass(frozen=True)
class _Graph(Generic[T]):
    """What a function made when it was captured is made anew at every replay, in the same memory."""

    graph: torch.cuda.CUDAGraph
    made: T
    spans: CapturedSpans


@dataclass(frozen=True)
class _Pair(Generic[T]):
    """The same twice: the second marks its collectives. There is one where there are no collectives."""

    plain: _Graph[T]
    marked: _Graph[T]

    def close(self) -> None:
        for graph in {id(self.plain): self.plain, id(self.marked): self.marked}.values():
            graph.graph.reset()

    def replay(self, spans: DeviceSpans) -> T:
        chosen = self.marked if spans.is_sampled_step else self.plain
        chosen.graph.replay()
        spans.replayed(chosen.spans)
        return chosen.made


@dataclass(frozen=True)
class _Bucket:
    """Graphs of one number of rows: int64 [2, rows] slots and positions, hidden states [rows, D] from the stage
    before; what the stage's layers make of them; on the last stage, what is chosen greedily."""

    given: torch.Tensor
    hidden: torch.Tensor | None
    layers: _Pair[torch.Tensor]
    greedy: _Pair[Chosen] | None


class DecodeGraphs:
    """Of one rank; captured before the first step, by all ranks of a tensor group in the same order."""

    def __init__(
        self,
        model: StageModel,
        slots: Slots,
        sampler: Sampler | None,
        last_ids: torch.Tensor,
        hidden: tuple[int, torch.dtype],
        spans: DeviceSpans,
        num_slots: int,
    ) -> None:
        self._model, self._slots, self._sampler = model, slots, sampler
        self._last_ids, self._hidden, self._spans = last_ids, hidden, spans
        self._device = last_ids.device
        self._pool = torch.cuda.graph_pool_handle()
        self._sizes = graph_sizes(num_slots)
        largest_first = reversed(self._sizes)  # what they hold for a moment is held once
        self._buckets = {size: self._bucket(size) for size in largest_first}

    def close(self) -> None:
        """Before the groups are left that their collectives are of: NCCL would wait for them."""
        for bucket in self._buckets.values():
            for pair in (bucket.layers, bucket.greedy):
                if pair is not None:
                    pair.close()
        self._buckets.clear()

    def take(self, batch: ScheduledBatch) -> bool:
        return batch.is_decode and len(batch.pieces) <= self._sizes[-1]

    def run(self, batch: ScheduledBatch, hidden: torch.Tensor | None) -> torch.Tensor:
        """The stage's layers: hidden states [T, D] from the stage before, if any -> [T, D]."""
        bucket, count = self._of(batch), len(batch.pieces)
        padding = bucket.given.shape[1] - count
        slots = [piece.slot for piece in batch.pieces] + [self._slots.padding_slot] * padding
        positions = [piece.start for piece in batch.pieces] + [0] * padding
        packed = torch.tensor([slots, positions]).pin_memory()
        bucket.given.copy_(packed, non_blocking=True)
        if bucket.hidden is not None:
            assert hidden is not None
            bucket.hidden[:count] = hidden
        return bucket.layers.replay(self._spans)[:count]

    def choose(self, batch: ScheduledBatch) -> Chosen:
        """The likeliest ids, from what `run` made for this batch; they are the slots' last ids from here on."""
        bucket, count = self._of(batch), len(batch.pieces)
        assert bucket.greedy is not None
        made = bucket.greedy.replay(self._spans)
        return Chosen(made.slots[:count], made.ids[:count], made.logits[:count])

    def _of(self, batch: ScheduledBatch) -> _Bucket:
        return self._buckets[self._sizes[bisect_left(self._sizes, len(batch.pieces))]]

    # --- capture -------------------------------------------------------------------------------

    def _bucket(self, size: int) -> _Bucket:
        given = torch.zeros(2, size, dtype=torch.int64, device=self._device)
        given[0] = self._slots.padding_slot
        hidden = None
        if self._model.embedding is None:
            width, dtype = self._hidden
            hidden = torch.zeros(size, width, dtype=dtype, device=self._device)

        def layers() -> torch.Tensor:
            step = self._slots.paged(given[0], given[1], None)
            x = self._last_ids[given[0]] if hidden is None else hidden
            made: torch.Tensor = self._model(x, step)
            return made

        made = self._pair(layers, layers)
        return _Bucket(given, hidden, made, self._greedy(given[0], made))

    def _greedy(self, slots: torch.Tensor, made: _Pair[torch.Tensor]) -> _Pair[Chosen] | None:
        """Each of the pair takes what its own layers made."""
        sampler = self._sampler
        if sampler is None:
            return None

        def choose(x: torch.Tensor) -> Chosen:
            chosen = sampler.likeliest(slots, x)
            self._last_ids.index_copy_(0, slots, chosen.ids)
            return chosen

        return self._pair(lambda: choose(made.plain.made), lambda: choose(made.marked.made))

    def _pair(self, function: Callable[[], T], marked: Callable[[], T]) -> _Pair[T]:
        aside = torch.cuda.Stream(self._device)
        aside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(aside):
            function()  # kernels are compiled and libraries make their plans, which cannot be captured
        torch.cuda.current_stream(self._device).wait_stream(aside)
        plain = self._capture(function, is_marked=False)
        if not plain.spans.counts:
            return _Pair(plain, plain)
        return _Pair(plain, self._capture(marked, is_marked=True))

    def _capture(self, function: Callable[[], T], *, is_marked: bool) -> _Graph[T]:
        graph = torch.cuda.CUDAGraph()
        with (
            self._spans.capturing(is_marked=is_marked) as spans,
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            made = function()
        return _Graph(graph, made, spans)
