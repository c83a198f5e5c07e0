"""A stage computed on tiles of a fixed number of rows: bitwise the same result for a token, whatever
else is in its batch and however its request was split over steps.

All operations of a tile have shapes of their own, and each row keeps to itself. Whether a row's
place in the tile matters is up to the libraries below; it is tried out before the first request,
and the largest tile is taken for which it does not.
Shapes: T tokens, n of them in a tile, N rows of a tile, D hidden size, S sampled rows, V local vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from bireme.engine.capture import Watch
from bireme.engine.captured import CapturedGraph, GraphCapturer, nothing_collected
from bireme.engine.limits import MOST_TILE_ROWS
from bireme.engine.slots import Slots, rows_of
from bireme.errors import EngineError
from bireme.kernels.host_copies import upload_into
from bireme.models.blocks import StageModel
from bireme.parallel.mesh import Mesh
from bireme.request import ScheduledPiece

_MOST_GATHERED = 16  # rows, whose contexts are gathered whether they are a token's or not


class _Tiles(Protocol):
    """Computes one tile after another."""

    def run(
        self,
        x: torch.Tensor,
        slots: NDArray[np.int64],
        positions: NDArray[np.int64],
        watch: Watch,
    ) -> torch.Tensor:
        """ids [n] or hidden states [n, D] at positions [n] of slots [n] -> hidden states [n, D]"""

    def close(self) -> None: ...


def _padded(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    whole = rows.new_zeros(num_rows, *rows.shape[1:])
    whole[: len(rows)] = rows
    return whole


class _GatheredTiles:
    """Every row's context is gathered, and gone through in splits of a fixed size."""

    def __init__(self, model: StageModel, slots: Slots, num_rows: int) -> None:
        self._model, self._slots, self._num_rows = model, slots, num_rows

    def run(
        self,
        x: torch.Tensor,
        slots: NDArray[np.int64],
        positions: NDArray[np.int64],
        watch: Watch,
    ) -> torch.Tensor:
        step = self._slots.tile(slots, positions, self._num_rows)
        made: torch.Tensor = self._model(_padded(x, self._num_rows), step)
        return made[: len(x)]

    def close(self) -> None:
        pass


class _PagedTiles:
    """The kernels of a GPU take every row for a sequence's one new token: in how many splits they go through its
    context depends on N alone, and where these begin on its position."""

    def __init__(
        self,
        model: StageModel,
        slots: Slots,
        num_rows: int,
        inputs: torch.Tensor,
        capturer: GraphCapturer | None,
    ) -> None:
        """Of rows like `inputs`; captured, or launched kernel by kernel."""
        self._model, self._slots, self._num_rows = model, slots, num_rows
        self._x = inputs.new_zeros(num_rows, *inputs.shape[1:])
        self._given = torch.zeros(2, num_rows, dtype=torch.int64, device=inputs.device)
        self._given[0] = slots.padding_slot
        self._replay: Callable[[], torch.Tensor] | None = None
        self._graph: CapturedGraph | None = None
        if capturer is not None:
            with nothing_collected():
                self._graph = capturer.capture(self._launch)
            self._replay = partial(self._graph.replay, capturer.spans)

    def run(
        self,
        x: torch.Tensor,
        slots: NDArray[np.int64],
        positions: NDArray[np.int64],
        watch: Watch,
    ) -> torch.Tensor:
        given = np.zeros((2, self._num_rows), dtype=np.int64)
        given[0] = self._slots.padding_slot
        given[:, : len(x)] = slots, positions
        upload_into(self._given, torch.from_numpy(given))
        self._x[: len(x)] = x
        self._x[len(x) :] = 0
        if self._replay is None or watch is not Watch.NOTHING:
            return self._launch(is_probed=watch is Watch.ALL)[: len(x)]
        return self._replay()[: len(x)].clone()

    def _launch(self, *, is_probed: bool = False) -> torch.Tensor:
        slots, positions = self._given
        step = self._slots.paged(slots, positions, None, is_probed=is_probed)
        made: torch.Tensor = self._model(self._x, step)
        return made

    def close(self) -> None:
        graph, self._graph, self._replay = self._graph, None, None
        if graph is not None:
            graph.close()


class TiledModel:
    """Stands in for a stage's model."""

    def __init__(self, model: StageModel, tiles: _Tiles, num_rows: int) -> None:
        self._model, self._tiles, self.num_rows = model, tiles, num_rows

    def __call__(
        self, x: torch.Tensor, pieces: Sequence[ScheduledPiece], watch: Watch = Watch.NOTHING
    ) -> torch.Tensor:
        """ids [T] or hidden states [T, D] -> hidden states [T, D]"""
        slots, positions = rows_of(pieces)
        return self.at(x, slots, positions, watch)

    def at(
        self,
        x: torch.Tensor,
        slots: NDArray[np.int64],
        positions: NDArray[np.int64],
        watch: Watch = Watch.NOTHING,
    ) -> torch.Tensor:
        """Rows at positions of slots, in tiles one after another: a later one sees an earlier one."""
        parts = []
        for first in range(0, len(x), self.num_rows):
            rows = slice(first, first + self.num_rows)
            parts.append(self._tiles.run(x[rows], slots[rows], positions[rows], watch))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[S, D] -> [S, V]"""
        parts = [
            self._model.logits(_padded(rows, self.num_rows))[: len(rows)]
            for rows in x.split(self.num_rows)
        ]
        return torch.cat(parts)

    def close(self) -> None:
        """Before the groups are left that tiles sum over."""
        self._tiles.close()


def _sizes(slots: Slots) -> list[int]:
    """That are tried, the largest first."""
    most = MOST_TILE_ROWS if slots.is_paged else _MOST_GATHERED
    return [most >> halvings for halvings in range(most.bit_length())]


def num_tried(slots: Slots) -> int:
    """Rows that sizes of tiles are tried with: two of the largest, as far as the cache has room for them."""
    return min(2 * _sizes(slots)[0], slots.num_places)


@torch.inference_mode()
def tile_model(
    model: StageModel,
    slots: Slots,
    mesh: Mesh,
    inputs: torch.Tensor,
    capturer: Callable[[], GraphCapturer | None] = lambda: None,
) -> TiledModel:
    """With the largest tile that keeps its rows apart; all ranks of a tensor group call it together.

    `inputs` are `num_tried` made-up ids or hidden states, the same on each of them; `capturer` makes one for each size,
    where tiles are to be CUDA graphs. EngineError where not even one row a tile gives the same twice.
    """
    slots.try_on(len(inputs))
    for size in (size for size in _sizes(slots) if size <= len(inputs)):
        tiles: _Tiles = (
            _PagedTiles(model, slots, size, inputs, capturer())
            if slots.is_paged
            else _GatheredTiles(model, slots, size)
        )
        tiled = TiledModel(model, tiles, size)
        found = _looks_apart(tiled, model, inputs[: min(2, len(inputs) // size) * size])
        if all(_agree(mesh, is_same, inputs.device) for is_same in found):
            return tiled
        tiled.close()
    raise EngineError("this device gives no two equal results, so nothing on it is deterministic")


def _agree(mesh: Mesh, is_same: bool, device: torch.device) -> bool:
    """Whether it is on all ranks of the tensor group, which look at the same in the same order."""
    differs = torch.tensor([not is_same], device=device).long()
    return not mesh.tensor.all_reduce(differs).item()


def _looks_apart(tiled: TiledModel, model: StageModel, x: torch.Tensor) -> Iterator[bool]:
    """Whether a sequence in whole tiles is the same token by token, and in tiles with their rows in another order, and
    so are its logits."""
    positions, slots = np.arange(len(x)), np.zeros(len(x), dtype=np.int64)
    whole = tiled.at(x, slots, positions)
    single = [tiled.at(x[at : at + 1], slots[:1], positions[at : at + 1]) for at in positions]
    yield torch.equal(whole, torch.cat(single))
    logits = None
    if model.head is not None:
        logits = tiled.logits(whole)
        yield torch.equal(logits, torch.cat([tiled.logits(row) for row in whole.split(1)]))
    tiles = positions.reshape(-1, tiled.num_rows)
    for shift in range(1, tiled.num_rows):
        order = np.roll(tiles, shift, axis=1).ravel()
        yield torch.equal(whole[order], tiled.at(x[order], slots, positions[order]))
        if logits is not None:
            yield torch.equal(logits[order], tiled.logits(whole[order]))
