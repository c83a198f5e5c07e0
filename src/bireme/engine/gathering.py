"""Contexts that are gathered from the cache, where no kernel reads it in place: the places that a step's sequences look
at.

Sequences are attended to in groups, so that what attention gathers stays within the workspace: one
half for keys and values, a quarter for scores, a quarter for biases that layers share. One
sequence's whole context is gathered at once, however long it is.
Shapes: B sequences, t tokens a sequence, C context tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bireme.kernels.host_copies import upload
from bireme.models.attention import PagedAttention
from bireme.models.step import SequenceGroup
from bireme.parallel.layout import StepWork
from bireme.request import ScheduledPiece


@dataclass(frozen=True)
class Workspace:
    """What attention may gather at once, and what it takes: bytes for each place of a context, and
    for each pair of a query and a place."""

    num_bytes: int
    place_bytes: int
    score_bytes: int

    @classmethod
    def of(
        cls, attentions: Sequence[PagedAttention], num_bytes: int, dtype: torch.dtype
    ) -> Workspace:
        work = reduce(StepWork.largest, (module.work for module in attentions), StepWork())
        return cls(num_bytes, work.place_elements * dtype.itemsize, work.score_elements * 4)

    def max_queries(self, num_context: int) -> int:
        """New tokens of one sequence whose scores fit."""
        return max(1, self.num_bytes // 4 // max(1, num_context * self.score_bytes))

    def holds(self, num_sequences: int, num_context: int) -> bool:
        """True if so many sequences with one new token each fit together."""
        places = num_sequences * num_context
        return (
            places * self.place_bytes <= self.num_bytes // 2
            and places * self.score_bytes <= self.num_bytes // 4
        )

    def keeps_biases(self, groups: list[SequenceGroup], num_windows: int) -> bool:
        """True if the biases of all groups fit, one for each length of window."""
        pairs = sum(group.rows.numel() * group.num_context for group in groups)
        return pairs * self.score_bytes * num_windows <= self.num_bytes // 4


@dataclass(frozen=True)
class _Run:
    """New tokens [start, start + num_tokens) of a slot, from row `first_row` of the step on."""

    slot: int
    start: int
    num_tokens: int
    first_row: int

    @property
    def num_context(self) -> int:
        return self.start + self.num_tokens


class Gathering:
    """By block tables [slots, blocks] of the layers' windows, which others keep up to date on the host."""

    def __init__(
        self,
        tables: Mapping[int | None, NDArray[np.int64]],
        block_size: int,
        workspace: Workspace,
        device: torch.device,
    ) -> None:
        self._tables, self._block_size = tables, block_size
        self._workspace, self._device = workspace, device

    def _upload(self, numbers: NDArray[Any]) -> torch.Tensor:
        return upload(torch.from_numpy(numbers), self._device)

    def groups(self, pieces: list[ScheduledPiece]) -> list[SequenceGroup]:
        """Of a step's pieces, in whose order its rows are."""
        starts = np.cumsum([0, *(piece.num_tokens for piece in pieces)])
        runs = [
            _Run(piece.slot, piece.start, piece.num_tokens, int(row))
            for piece, row in zip(pieces, starts, strict=False)
        ]
        groups = [self._group(members) for members in self._together(runs)]
        keeps = self._workspace.keeps_biases(groups, len(self._tables))
        for group in groups:
            group.keeps_bias = keeps
        return groups

    def _together(self, runs: list[_Run]) -> Iterator[list[_Run]]:
        """Single tokens by context length, as many as fit; longer runs alone."""
        singles = sorted((run for run in runs if run.num_tokens == 1), key=lambda r: r.num_context)
        members: list[_Run] = []
        for run in singles:
            if members and not self._workspace.holds(len(members) + 1, run.num_context):
                yield members
                members = []
            members.append(run)
        if members:
            yield members
        yield from ([run] for run in runs if run.num_tokens > 1)

    def _group(self, runs: list[_Run]) -> SequenceGroup:
        runs = sorted(runs, key=lambda run: run.first_row)
        steps = np.arange(runs[0].num_tokens)
        first = np.array([run.start for run in runs])
        lengths = first + len(steps)
        num_context, size = int(lengths.max()), self._block_size
        if len(steps) == 1:  # whole blocks: a kernel is made for each size, and not for each token
            num_context = -(-num_context // size) * size
        context = np.arange(num_context)
        slots = np.array([run.slot for run in runs])
        rows = np.array([run.first_row for run in runs])
        return SequenceGroup(
            rows=self._upload(rows[:, None] + steps),
            positions=self._upload(first[:, None] + steps),
            context=self.context(
                slots[:, None], context[None], first[:, None], lengths[:, None] - 1
            ),
            num_context=num_context,
            lowest=int(first.min()),
            num_at_once=self._workspace.max_queries(num_context),
        )

    def context(
        self,
        slots: NDArray[np.int64],
        positions: NDArray[np.int64],
        oldest: NDArray[np.int64],
        newest: NDArray[np.int64],
    ) -> dict[int | None, torch.Tensor]:
        """Places of positions that queries [oldest, newest] look at in the layers of each window; place
        0 for the others, whose blocks may be another request's by now."""
        found = self.places(slots, positions)
        for window, places in found.items():
            is_hidden = positions > newest
            if window is not None:
                is_hidden = is_hidden | (positions <= oldest - window)
            places.masked_fill_(self._upload(is_hidden), 0)
        return found

    def places(
        self, slots: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> dict[int | None, torch.Tensor]:
        """Where positions of slots lie in the layers of each window."""
        size, found = self._block_size, {}
        blocks, offsets = positions // size, positions % size
        for window, table in self._tables.items():
            places = table[slots, blocks] * size + offsets
            found[window] = self._upload(places)
        return found
