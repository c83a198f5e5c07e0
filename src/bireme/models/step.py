"""What one step tells every layer of a stage: who its tokens are, and what they attend to.

Shapes: T tokens of a step, H local query heads, B sequences, t tokens a sequence, C context tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from bireme.kernels.attention import attention_bias
from bireme.kernels.context_splits import ContextSplits
from bireme.kernels.query_tiles import Tiles
from bireme.kvcache.paged_cache import PagedCache


@dataclass
class SequenceGroup:
    """Sequences of a step with equal numbers of new tokens, attended to in one call: several with
    one new token, or one.

    rows [B, t] of the step's tokens, in their order; positions [B, t], none below `lowest`; context [B, C] places
    of the cache for the layers of each window, padded with place 0. A long run of tokens is
    attended to `num_at_once` at a time. `keeps_bias`: layers share the bias of the scores.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    context: dict[int | None, torch.Tensor]
    num_context: int
    lowest: int
    num_at_once: int
    keeps_bias: bool = True
    _biases: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)

    @property
    def slices(self) -> list[tuple[int, int]]:
        """Queries [first, last) that are attended to at a time."""
        size, total = self.num_at_once, self.rows.shape[1]
        return [(first, min(total, first + size)) for first in range(0, total, size)]

    def seen(self, queries: tuple[int, int], window: int | None) -> tuple[int, int]:
        """The positions that some of the queries look at."""
        first, last = queries
        stop = self.num_context - (self.rows.shape[1] - last)
        return 0 if window is None else max(0, self.lowest + first - window + 1), stop

    def bias(
        self,
        queries: tuple[int, int],
        window: int | None,
        slopes: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """[B, 1 or H, queries, positions seen]"""
        key = (queries[0], window)
        if key in self._biases:
            return self._biases[key]
        positions = self.positions[:, slice(*queries)]
        bias = attention_bias(positions, self.seen(queries, window), window, slopes, dtype)
        if self.keeps_bias:
            self._biases[key] = bias
        return bias


@dataclass
class Tile:
    """A fixed number of rows that a stage computes alike, whoever they belong to: positions [N], and
    context [N, C] places of the cache for the layers of each window, C a multiple of a split. The
    last rows may be padding: nothing of theirs is written."""

    positions: torch.Tensor
    context: dict[int | None, torch.Tensor]


@dataclass
class PagedStep:
    """What the kernels of a GPU read the cache by: slots [T], and int32 [slots, blocks] by the layers' window.
    `tiles` are the runs of new tokens; None where every row is the one new token of its sequence. `splits`, by
    window too, are those of the contexts of single new tokens. `is_probed`: somebody wants to see what every module
    makes."""

    slots: torch.Tensor
    tables: dict[int | None, torch.Tensor]
    block_size: int
    tiles: Tiles | None
    splits: dict[int | None, ContextSplits] = field(default_factory=dict)
    is_probed: bool = False


@dataclass
class Asked:
    """Rows [S] of a step, whose hidden states are all that anybody asks for behind the last layer: this one needs no
    more than the keys and values of the others. `step` says what these rows attend to."""

    rows: torch.Tensor
    step: StepContext


@dataclass
class StepContext:
    """What every layer of a stage must know of a step: positions [T], places [T] of the new keys in
    the layers of each window, cos and sin [T, rotary_dim / 2], and the cache of each of the stage's
    layers. `groups`, a `tile` or, on a GPU, `paged` say who attends to what. A layer makes the rows that are `asked`
    for, or all."""

    positions: torch.Tensor
    places: dict[int | None, torch.Tensor]
    groups: list[SequenceGroup]
    caches: dict[int, PagedCache]
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    tile: Tile | None = None
    paged: PagedStep | None = None
    asked: Asked | None = None

    def of_asked(self, x: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [S, D]"""
        return x if self.asked is None else x[self.asked.rows]
