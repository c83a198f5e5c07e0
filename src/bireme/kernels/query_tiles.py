"""Runs of new tokens, cut into the tiles that a GPU attends to at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bireme.kernels.host_copies import upload

TILE = 64  # queries


def num_tiles(counts: Sequence[int]) -> int:
    """Of runs of so many tokens."""
    return sum(-(-count // TILE) for count in counts)


@dataclass(frozen=True)
class Tiles:
    """Where a step's runs lie: int32 [tiles, 4] of first row, its position, rows, and from which position on the run's
    rows lie side by side in the step; no rows in a tile that is of no run. The step's first `num_singles` rows are in
    none: each is the one new token of its sequence, and not attended to by tiles. `has_other_rows`: there may be rows
    beside these that are in none."""

    on_device: torch.Tensor
    has_other_rows: bool = False
    num_singles: int = 0

    @classmethod
    def of(cls, starts: Sequence[int], counts: Sequence[int], device: torch.device) -> Tiles:
        """Of runs of `counts` tokens in the step's order, that begin at positions `starts`."""
        num_singles = next((at for at, count in enumerate(counts) if count > 1), len(counts))
        cut = _cut(starts[num_singles:], counts[num_singles:], num_singles)
        return cls(upload(torch.from_numpy(cut), device), num_singles=num_singles)

    @classmethod
    def room(cls, most_tiles: int, device: torch.device) -> Tiles:
        """For the runs of changing steps; no more of them than that."""
        return cls(torch.zeros(most_tiles, 4, dtype=torch.int32, device=device), True)

    def first(self, most_tiles: int) -> Tiles:
        """Part of the same room."""
        return Tiles(self.on_device[:most_tiles], self.has_other_rows)

    def become(self, starts: Sequence[int], counts: Sequence[int]) -> None:
        """From here on those of other runs."""
        device = self.on_device.device
        host = torch.zeros_like(self.on_device, device="cpu", pin_memory=device.type == "cuda")
        cut = torch.from_numpy(_cut(starts, counts, 0))
        host[: len(cut)] = cut
        self.on_device.copy_(host, non_blocking=True)


def _cut(starts: Sequence[int], counts: Sequence[int], row: int) -> NDArray[np.int32]:
    """Runs from `row` on; the last tiles of a run come first: they have most to do."""
    found = []
    for start, count in zip(starts, counts, strict=True):
        # one row is read where all before it are, in the cache
        beside = start if count > 1 else start + 1
        found += [
            (row + first, start + first, min(TILE, count - first), beside)
            for first in range(0, count, TILE)
        ]
        row += count
    found.sort(key=lambda tile: -tile[1])
    return np.array(found, dtype=np.int32).reshape(-1, 4)
