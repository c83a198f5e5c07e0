"""A stage's steps as CUDA graphs: one launch where there were hundreds.

A graph is of a number of rows; a step takes the next larger one, and fills it up with rows of no request.
What changes between steps lies on the device: ids, positions, block tables. Steps in which every sequence has one
new token have graphs of their own. Of others, all but the largest have, which take a GPU far longer than their launches
take the host; single new tokens are runs there, which costs more than a kernel of their own would: large steps with
many of them are launched kernel by kernel. All of these graphs but the smallest leave out the last layer of all,
which makes as many rows as are asked for, launched while the graph is still busy.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import numpy as np
import torch

from bireme.engine.sampling.sampler import Chosen, Sampler
from bireme.engine.slots import Slots, rows_of
from bireme.kernels.device_spans import CapturedSpans, DeviceSpans
from bireme.kernels.query_tiles import TILE, Tiles, num_tiles
from bireme.models.blocks import StageModel
from bireme.models.step import StepContext
from bireme.request import ScheduledBatch

_SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
_LARGEST_STRIDE = 128  # between the sizes beyond
_MOST_NOTED = 4  # collectives of a graph that stamps of them beside it hold up little
_LARGE_STEP = 512  # tokens, which take a GPU longer than launches of their kernels take the host
_MANY_SINGLES = 32  # sequences with one new token, in a large step
_MOST_RUNS = 256  # of tokens, in a step with prompts, each of them at most a tile more
_PROMPT_SIZES = (
    64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048,
    2560, 3072, 3584, 4096,
)  # fmt: skip


def graph_sizes(most: int) -> tuple[int, ...]:
    """Rows that graphs of decode steps are captured for, up to `most`."""
    beyond = range(_SIZES[-1] + _LARGEST_STRIDE, most, _LARGEST_STRIDE)
    return (*(size for size in (*_SIZES, *beyond) if size < most), most)


def prompt_graph_sizes(most: int) -> tuple[int, ...]:
    """Rows that graphs of steps with prompts are captured for, where a step has at most `most`."""
    return tuple(size for size in _PROMPT_SIZES if size <= most)


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """While a stream is captured nothing may be given back to the device, as the end of an earlier model's parts
    would, whenever a collection comes upon them. So what can be is given back before, and after."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
        torch.cuda.empty_cache()


def _counts(batch: ScheduledBatch) -> list[int]:
    return [piece.num_tokens for piece in batch.pieces]


@dataclass(frozen=True)
class _Graph:
    """What a function made when it was captured is made anew at every replay, in the same memory. `noting`: the same
    with stamps of all collectives, where this one has none of many."""

    graph: torch.cuda.CUDAGraph
    made: torch.Tensor
    spans: CapturedSpans
    noting: _Graph | None = None

    def replay(self, spans: DeviceSpans) -> torch.Tensor:
        if self.noting is not None and spans.is_sampled_step:
            return self.made.copy_(self.noting.replay(spans))
        self.graph.replay()
        spans.replayed(self.spans)
        return self.made

    def close(self) -> None:
        self.graph.reset()
        if self.noting is not None:
            self.noting.close()


@dataclass(frozen=True)
class _Bucket:
    """Graphs of one number of rows: int64 [2, rows] slots and positions; what comes in, ids [rows] or hidden
    states [rows, D] from the stage before, None where a slot's last id is meant; where the runs of tokens lie, None
    where each row is one; what the stage's layers, or all but the last, make of them; on the last stage, what is
    chosen greedily."""

    given: torch.Tensor
    inputs: torch.Tensor | None
    tiles: Tiles | None
    layers: _Graph
    greedy: _Graph | None
    leaves_last_layer: bool = False


class StepGraphs:
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
        most_tokens: int,
    ) -> None:
        self._model, self._slots, self._sampler = model, slots, sampler
        self._last_ids, self._hidden, self._spans = last_ids, hidden, spans
        self._device = last_ids.device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(self._device)
        self._sizes = graph_sizes(num_slots)
        self._prompt_sizes = prompt_graph_sizes(most_tokens)
        # of steps with prompts: one for all sizes, since steps follow one another
        most = max((0, *self._prompt_sizes))
        self._prompt_given = torch.zeros(2 * most, dtype=torch.int64, device=self._device)
        self._prompt_made = self._hidden_rows(most)
        self._prompt_inputs = self._hidden_rows(most)
        if model.embedding is not None:
            self._prompt_inputs = torch.zeros(most, dtype=torch.int64, device=self._device)
        self._tiles = Tiles.room(most // TILE + _MOST_RUNS, self._device)
        with _nothing_collected():
            # the largest first: what they hold for a moment is held once
            prompts, decodes = reversed(self._prompt_sizes), reversed(self._sizes)
            self._prompts = {size: self._prompt_bucket(size) for size in prompts}
            self._decodes = {size: self._decode_bucket(size) for size in decodes}

    def close(self) -> None:
        """Before the groups are left that their collectives are of: NCCL would wait for them."""
        for buckets in (self._prompts, self._decodes):
            for bucket in buckets.values():
                for captured in (bucket.layers, bucket.greedy):
                    if captured is not None:
                        captured.close()
            buckets.clear()

    def take(self, batch: ScheduledBatch) -> bool:
        if batch.is_decode:
            return len(batch.pieces) <= self._sizes[-1]
        if not self._prompts or batch.num_tokens > self._prompt_sizes[-1]:
            return False
        counts = _counts(batch)
        if batch.num_tokens > _LARGE_STEP and counts.count(1) > _MANY_SINGLES:
            return False
        bucket = self._of(batch)
        assert bucket.tiles is not None
        return num_tiles(counts) <= len(bucket.tiles.on_device)

    def leaves_last_layer(self, batch: ScheduledBatch) -> bool:
        """Whether `run` of this batch is without the stage's last layer."""
        return self._of(batch).leaves_last_layer

    def place(self, batch: ScheduledBatch, inputs: torch.Tensor | None) -> None:
        """What `run` of this batch is of: ids [T] or hidden states [T, D], or the slots' last ids."""
        bucket, count = self._of(batch), batch.num_tokens
        rows = bucket.given.shape[1]
        packed = np.full((2, rows), ((self._slots.padding_slot,), (0,)))
        packed[:, :count] = rows_of(batch.pieces)
        bucket.given.copy_(torch.from_numpy(packed).pin_memory(), non_blocking=True)
        if bucket.tiles is not None:
            bucket.tiles.become([piece.start for piece in batch.pieces], _counts(batch))
        if bucket.inputs is not None:
            assert inputs is not None
            bucket.inputs[:count] = inputs

    def run(self, batch: ScheduledBatch) -> torch.Tensor:
        """The stage's layers, of the batch that was placed last -> [T, D]"""
        return self._of(batch).layers.replay(self._spans)[: batch.num_tokens]

    def choose(self, batch: ScheduledBatch) -> Chosen:
        """The likeliest ids, from what `run` made for this batch, of one new token a sequence; they are the slots'
        last ids from here on."""
        bucket, count = self._of(batch), len(batch.pieces)
        assert bucket.greedy is not None
        ids = bucket.greedy.replay(self._spans)
        return Chosen(bucket.given[0, :count], ids[:count], None)

    def _of(self, batch: ScheduledBatch) -> _Bucket:
        if batch.is_decode:
            return self._decodes[self._sizes[bisect_left(self._sizes, len(batch.pieces))]]
        return self._prompts[self._prompt_sizes[bisect_left(self._prompt_sizes, batch.num_tokens)]]

    # --- capture -------------------------------------------------------------------------------

    def _decode_bucket(self, size: int) -> _Bucket:
        given = self._cleared(torch.empty(2, size, dtype=torch.int64, device=self._device))
        inputs = None if self._model.embedding is not None else self._hidden_rows(size)
        layers = self._layers(self._model, given, inputs, None)
        return _Bucket(given, inputs, None, layers, self._greedy(given[0], layers.made))

    def _prompt_bucket(self, size: int) -> _Bucket:
        given = self._cleared(self._prompt_given[: 2 * size].view(2, size))
        inputs, tiles = self._prompt_inputs[:size], self._tiles.first(size // TILE + _MOST_RUNS)
        # of so few tokens the last layer would need kernels that decode steps need not have compiled
        leaves_last_layer = self._sampler is not None and size > self._prompt_sizes[0]
        run = self._model.begin if leaves_last_layer else self._model
        layers = self._layers(run, given, inputs, tiles, self._prompt_made[:size])
        return _Bucket(given, inputs, tiles, layers, None, leaves_last_layer)

    def _cleared(self, given: torch.Tensor) -> torch.Tensor:
        """All rows of no request."""
        given[0], given[1] = self._slots.padding_slot, 0
        return given

    def _hidden_rows(self, size: int) -> torch.Tensor:
        width, dtype = self._hidden
        return torch.zeros(size, width, dtype=dtype, device=self._device)

    def _layers(
        self,
        run: Callable[[torch.Tensor, StepContext], torch.Tensor],
        given: torch.Tensor,
        inputs: torch.Tensor | None,
        tiles: Tiles | None,
        place: torch.Tensor | None = None,
    ) -> _Graph:
        """Into `place`, or where what is made lies anyway."""

        def layers() -> torch.Tensor:
            step = self._slots.paged(given[0], given[1], tiles)
            made = run(self._last_ids[given[0]] if inputs is None else inputs, step)
            return made if place is None else place.copy_(made)

        return self._graph(layers)

    def _greedy(self, slots: torch.Tensor, made: torch.Tensor) -> _Graph | None:
        sampler = self._sampler
        if sampler is None:
            return None

        def choose() -> torch.Tensor:
            ids = sampler.likeliest(made)
            self._last_ids.index_copy_(0, slots, ids)
            return ids

        return self._graph(choose)

    def _graph(self, function: Callable[[], torch.Tensor]) -> _Graph:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            function()  # kernels are compiled and libraries make their plans, which cannot be captured
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        noting = self._capture(function)
        if noting.spans.num_others <= _MOST_NOTED:
            return noting
        return replace(self._capture(function, notes_others=False), noting=noting)

    def _capture(
        self, function: Callable[[], torch.Tensor], *, notes_others: bool = True
    ) -> _Graph:
        """Without what `torch.cuda.graph` does each time: its stream is the first device's, and it gives all cached
        memory back."""
        graph = torch.cuda.CUDAGraph()
        with (
            self._spans.capturing(notes_others=notes_others) as spans,
            torch.cuda.stream(self._stream),
        ):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                made = function()
            except BaseException:
                with suppress(RuntimeError):  # the capture is void: the first error tells why
                    graph.capture_end()
                raise
            graph.capture_end()
        return _Graph(graph, made, spans)
