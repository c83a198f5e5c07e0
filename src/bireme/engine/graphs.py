"""A stage's steps as CUDA graphs: one launch where there were hundreds.

A graph is of a number of rows; a step takes the next larger one, and fills it up with rows of no request. What changes
between steps lies on the device, and gets there in one copy: slots, positions, ids. Steps in which every sequence has
one new token have graphs of their own. Of others, all but the largest have, which take a GPU far longer than their
launches take the host; single new tokens are runs there, which costs more than a kernel of their own would: large steps
with many of them are launched kernel by kernel. All of these graphs but the smallest leave out the last layer of all,
which makes as many rows as are asked for, launched while the graph is still busy.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch

from bireme.engine.captured import CapturedGraph, GraphCapturer, nothing_collected
from bireme.engine.chunks import GRAPH_ROWS
from bireme.engine.given_rows import GivenRows
from bireme.engine.sampling.columns import ChoiceKind
from bireme.engine.sampling.sampler import Chosen, Sampler
from bireme.engine.slots import Slots
from bireme.kernels.query_tiles import TILE, num_tiles
from bireme.models.blocks import StageModel
from bireme.models.step import StepContext
from bireme.request import ScheduledBatch
from bireme.trace import SpanKind

_SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
_LARGEST_STRIDE = 128  # between the sizes beyond
_LARGE_STEP = 512  # tokens, which take a GPU longer than launches of their kernels take the host
_MANY_SINGLES = 32  # sequences with one new token, in a large step
_MOST_RUNS = 256  # of tokens, in a step with prompts, each of them at most a tile more


def graph_sizes(most: int) -> tuple[int, ...]:
    """Rows that graphs of decode steps are captured for, up to `most`."""
    beyond = range(_SIZES[-1] + _LARGEST_STRIDE, most, _LARGEST_STRIDE)
    return (*(size for size in (*_SIZES, *beyond) if size < most), most)


def prompt_graph_sizes(most: int) -> tuple[int, ...]:
    """Rows that graphs of steps with prompts are captured for, where a step has at most `most`."""
    return tuple(size for size in GRAPH_ROWS if size <= most)


def _most_tiles(rows: int) -> int:
    return rows // TILE + _MOST_RUNS


@dataclass(frozen=True)
class _Bucket:
    """Graphs of one number of rows: what these are; hidden states [rows, D] from the stage before; what the stage's
    layers, or all but the last, make of them; on the last stage, of decode steps, the choice of ids."""

    given: GivenRows
    hidden: torch.Tensor | None
    layers: CapturedGraph
    choices: Mapping[ChoiceKind, CapturedGraph]
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
        capturer: GraphCapturer,
        num_slots: int,
        most_tokens: int,
    ) -> None:
        self._model, self._slots, self._sampler = model, slots, sampler
        self._last_ids, self._hidden, self._spans = last_ids, hidden, capturer.spans
        self._device = last_ids.device
        self._capturer = capturer
        self._sizes = graph_sizes(num_slots)
        self._prompt_sizes = prompt_graph_sizes(most_tokens)
        # of steps with prompts: one for all sizes, since steps follow one another
        most = max((0, *self._prompt_sizes))
        self._prompt_given = self._words(GivenRows.num_words(most, _most_tiles(most)))
        self._prompt_made = self._hidden_rows(most)
        self._prompt_hidden = None if model.embedding is not None else self._hidden_rows(most)
        if sampler is not None:
            sampler.prepare()
        with nothing_collected():
            # the largest first: what they hold for a moment is held once
            prompts, decodes = reversed(self._prompt_sizes), reversed(self._sizes)
            self._prompts = {size: self._prompt_bucket(size) for size in prompts}
            self._decodes = {size: self._decode_bucket(size) for size in decodes}

    def close(self) -> None:
        """Before the groups are left that their collectives are of: NCCL would wait for them."""
        for buckets in (self._prompts, self._decodes):
            for bucket in buckets.values():
                for captured in (bucket.layers, *bucket.choices.values()):
                    captured.close()
            buckets.clear()

    def take(self, batch: ScheduledBatch) -> bool:
        if batch.is_decode:
            return len(batch.pieces) <= self._sizes[-1]
        if not self._prompts or batch.num_tokens > self._prompt_sizes[-1]:
            return False
        counts = [piece.num_tokens for piece in batch.pieces]
        if batch.num_tokens > _LARGE_STEP and counts.count(1) > _MANY_SINGLES:
            return False
        tiles = self._of(batch).given.tiles
        assert tiles is not None
        return num_tiles(counts) <= len(tiles.on_device)

    def leaves_last_layer(self, batch: ScheduledBatch) -> bool:
        """Whether `run` of this batch is without the stage's last layer."""
        return self._of(batch).leaves_last_layer

    def place(self, batch: ScheduledBatch, hidden: torch.Tensor | None) -> None:
        """What `run` of this batch is of: on the first stage the pieces' ids, and the slots' last ones; else hidden
        states [T, D]."""
        bucket, count = self._of(batch), batch.num_tokens
        bucket.given.become(batch.pieces, count, self._slots.padding_slot)
        if bucket.hidden is not None:
            assert hidden is not None
            bucket.hidden[:count] = hidden

    def span(self) -> AbstractContextManager[None]:
        """Of a step's layers, in which `run` is called once: from when the device comes to them."""
        return self._spans.span_since_graph(SpanKind.COMPUTE)

    def run(self, batch: ScheduledBatch) -> torch.Tensor:
        """The stage's layers, of the batch that was placed last -> [T, D]"""
        return self._of(batch).layers.replay(self._spans)[: batch.num_tokens]

    def choose(self, batch: ScheduledBatch) -> Chosen | None:
        """The next ids, from what `run` made for this batch; they are the slots' last ids from here on. None where no
        graph makes that choice."""
        if not batch.is_decode or self._sampler is None:
            return None
        kind = self._sampler.kind_alone(batch)
        if kind is None:
            return None
        bucket, count = self._of(batch), len(batch.pieces)
        ids = bucket.choices[kind].replay(self._spans)
        return Chosen(bucket.given.slots[:count], ids[:count], None)

    def _of(self, batch: ScheduledBatch) -> _Bucket:
        if batch.is_decode:
            return self._decodes[self._sizes[bisect_left(self._sizes, len(batch.pieces))]]
        return self._prompts[self._prompt_sizes[bisect_left(self._prompt_sizes, batch.num_tokens)]]

    # --- capture -------------------------------------------------------------------------------

    def _decode_bucket(self, size: int) -> _Bucket:
        given = GivenRows(self._words(GivenRows.num_words(size, None)), size, None)
        hidden = None if self._model.embedding is not None else self._hidden_rows(size)
        layers = self._layers(self._model, given, hidden)
        return _Bucket(given, hidden, layers, self._choices(given, layers.made))

    def _prompt_bucket(self, size: int) -> _Bucket:
        given = GivenRows(self._prompt_given, size, _most_tiles(size))
        hidden = None if self._prompt_hidden is None else self._prompt_hidden[:size]
        # of so few tokens the last layer would need kernels that decode steps need not have compiled
        leaves_last_layer = self._sampler is not None and size > self._prompt_sizes[0]
        run = self._model.begin if leaves_last_layer else self._model
        layers = self._layers(run, given, hidden, self._prompt_made[:size])
        return _Bucket(given, hidden, layers, {}, leaves_last_layer)

    def _words(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int64, device=self._device)

    def _hidden_rows(self, size: int) -> torch.Tensor:
        width, dtype = self._hidden
        return torch.zeros(size, width, dtype=dtype, device=self._device)

    def _layers(
        self,
        run: Callable[[torch.Tensor, StepContext], torch.Tensor],
        given: GivenRows,
        hidden: torch.Tensor | None,
        place: torch.Tensor | None = None,
    ) -> CapturedGraph:
        """Into `place`, or where what is made lies anyway."""
        given.clear(self._slots.padding_slot)

        def layers() -> torch.Tensor:
            step = self._slots.paged(given.slots, given.positions, given.tiles)
            made = run(self._ids(given) if hidden is None else hidden, step)
            return made if place is None else place.copy_(made)

        return self._capturer.capture(layers, notes_begin=True)

    def _ids(self, given: GivenRows) -> torch.Tensor:
        last = self._last_ids[given.slots]
        return last if given.ids is None else torch.where(given.ids < 0, last, given.ids)

    def _choices(self, given: GivenRows, made: torch.Tensor) -> dict[ChoiceKind, CapturedGraph]:
        sampler, slots = self._sampler, given.slots
        if sampler is None:
            return {}

        def choose(kind: ChoiceKind) -> torch.Tensor:
            ids = sampler.choose_alone(kind, made, slots, given.positions)
            self._last_ids.index_copy_(0, slots, ids)
            return ids

        return {kind: self._capturer.capture(partial(choose, kind)) for kind in ChoiceKind}
