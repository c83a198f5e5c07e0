"""Runs of new tokens, cut into the tiles that a GPU attends to at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bireme.kernels.choice import MULTIPROCESSORS
from bireme.kernels.host_copies import upload

TILE = 64  # queries
TILES_AT_ONCE = 2 * MULTIPROCESSORS  # each of one head, that a Hopper GPU attends to


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
        cut = tiles_of(starts[num_singles:], counts[num_singles:], num_singles)
        return cls(upload(torch.from_numpy(cut), device), num_singles=num_singles)


def tiles_of(starts: Sequence[int], counts: Sequence[int], row: int = 0) -> NDArray[np.int32]:
    """[tiles, 4] of runs from `row` on; the last tiles of a run come first: they have most to do."""
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
