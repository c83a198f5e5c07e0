"""A stage computed on tiles of a fixed number of rows: bitwise the same result for a token, whatever
else is in its batch and however its request was split over steps.

All operations of a tile have shapes of their own, and each row keeps to itself. Whether a row's
place in the tile matters is up to the libraries below; it is tried out before the first request,
and the largest tile is taken for which it does not.
Shapes: T tokens, N rows of a tile, D hidden size, S sampled rows, V local vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from bireme.engine.slots import Slots, rows_of
from bireme.errors import EngineError
from bireme.models.blocks import StageModel
from bireme.parallel.mesh import Mesh
from bireme.request import ScheduledPiece

SIZES = (16, 8, 4, 2, 1)


class TiledModel:
    """Stands in for a stage's model."""

    def __init__(self, model: StageModel, slots: Slots, num_rows: int) -> None:
        self._model, self._slots, self.num_rows = model, slots, num_rows

    def __call__(self, x: torch.Tensor, pieces: Sequence[ScheduledPiece]) -> torch.Tensor:
        """ids [T] or hidden states [T, D] -> hidden states [T, D]"""
        return self.at(x, *rows_of(pieces))

    def at(
        self, x: torch.Tensor, slots: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> torch.Tensor:
        """Rows at positions of slots, in tiles one after another: a later one sees an earlier one."""
        parts = []
        for first in range(0, len(x), self.num_rows):
            rows = slice(first, first + self.num_rows)
            step = self._slots.tile(slots[rows], positions[rows], self.num_rows)
            parts.append(self._model(self._padded(x[rows]), step)[: len(x[rows])])
        return torch.cat(parts)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[S, D] -> [S, V]"""
        parts = [
            self._model.logits(self._padded(rows))[: len(rows)] for rows in x.split(self.num_rows)
        ]
        return torch.cat(parts)

    def _padded(self, rows: torch.Tensor) -> torch.Tensor:
        whole = rows.new_zeros(self.num_rows, *rows.shape[1:])
        whole[: len(rows)] = rows
        return whole


@torch.inference_mode()
def tile_model(model: StageModel, slots: Slots, mesh: Mesh, inputs: torch.Tensor) -> TiledModel:
    """With the largest tile that keeps its rows apart; all ranks of a tensor group call it together.

    `inputs` are made-up ids or hidden states, the same on each of them. EngineError where not even
    one row a tile gives the same twice.
    """
    slots.try_on(len(inputs))
    for size in SIZES:
        whole = inputs[: len(inputs) // size * size]
        if not len(whole):
            continue
        tiled = TiledModel(model, slots, size)
        differs = torch.tensor([not _keeps_apart(tiled, model, whole)], device=inputs.device)
        if not mesh.tensor.all_reduce(differs.long()).item():
            return tiled
    raise EngineError("this device gives no two equal results, so nothing on it is deterministic")


def _keeps_apart(tiled: TiledModel, model: StageModel, x: torch.Tensor) -> bool:
    """True if a sequence in whole tiles, token by token, and in tiles with their rows in another
    order is the same, and so are its logits."""
    positions, slots = np.arange(len(x)), np.zeros(len(x), dtype=np.int64)
    tiles = positions.reshape(-1, tiled.num_rows)
    orders = [np.roll(tiles, shift, axis=1).ravel() for shift in range(1, tiled.num_rows)]
    whole = tiled.at(x, slots, positions)
    single = [tiled.at(x[at : at + 1], slots[:1], positions[at : at + 1]) for at in positions]
    is_same = torch.equal(whole, torch.cat(single))
    for order in orders:
        is_same &= torch.equal(whole[order], tiled.at(x[order], slots, positions[order]))
    if model.head is not None:
        logits = tiled.logits(whole)
        is_same &= torch.equal(logits, torch.cat([tiled.logits(row) for row in whole.split(1)]))
        for order in orders:
            is_same &= torch.equal(logits[order], tiled.logits(whole[order]))
    return is_same
