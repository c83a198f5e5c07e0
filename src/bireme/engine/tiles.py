"""A stage computed on tiles of a fixed number of rows: bitwise the same result for a token, whatever
else is in its batch and however its request was split over steps.

All operations of a tile have shapes of their own, and each row keeps to itself. Whether a row's
place in the tile matters is up to the libraries below; it is tried out before the first request,
and the largest tile is taken for which it does not.
Shapes: T tokens, n of them in a tile, N rows of a tile, D hidden size, S sampled rows, V local vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from bireme.engine.budget import MOST_GATHERED_ROWS, MOST_TILE_ROWS
from bireme.engine.capture import Watch
from bireme.engine.captured import CapturedGraph, GraphCapturer, nothing_collected
from bireme.engine.slots import Slots, rows_of
from bireme.errors import EngineError
from bireme.kernels.host_copies import upload_into
from bireme.models.blocks import StageModel
from bireme.parallel.mesh import Mesh
from bireme.request import ScheduledPiece


@dataclass(frozen=True)
class _Rows:
    """ids [T] or hidden states [T, D], at positions [T] of slots [T]"""

    x: torch.Tensor
    slots: NDArray[np.int64]
    positions: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, some: slice | NDArray[np.int64]) -> _Rows:
        return _Rows(self.x[some], self.slots[some], self.positions[some])


class TiledModel(ABC):
    """Stands in for a stage's model."""

    def __init__(self, model: StageModel, slots: Slots, num_rows: int) -> None:
        self._model, self._slots, self.num_rows = model, slots, num_rows

    def __call__(
        self, x: torch.Tensor, pieces: Sequence[ScheduledPiece], watch: Watch
    ) -> torch.Tensor:
        """ids [T] or hidden states [T, D] -> hidden states [T, D]"""
        return self.of_rows(_Rows(x, *rows_of(pieces)), watch)

    def of_rows(self, rows: _Rows, watch: Watch = Watch.NOTHING) -> torch.Tensor:
        """In tiles one after another: a later one sees an earlier one -> hidden states [T, D]"""
        parts = [
            self._of_tile(rows[first : first + self.num_rows], watch)
            for first in range(0, len(rows), self.num_rows)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @abstractmethod
    def _of_tile(self, rows: _Rows, watch: Watch) -> torch.Tensor:
        """Of n rows -> hidden states [n, D]"""

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[S, D] -> [S, V]"""
        parts = [
            self._model.logits(self._padded(rows))[: len(rows)] for rows in x.split(self.num_rows)
        ]
        return torch.cat(parts)

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        """[n, ...] -> [N, ...]"""
        whole = x.new_zeros(self.num_rows, *x.shape[1:])
        whole[: len(x)] = x
        return whole

    @abstractmethod
    def close(self) -> None:
        """Before the groups are left that tiles sum over."""


class _GatheredModel(TiledModel):
    """Every row's context is gathered, and gone through in splits of a fixed size."""

    def _of_tile(self, rows: _Rows, watch: Watch) -> torch.Tensor:
        step = self._slots.tile(rows.slots, rows.positions, self.num_rows)
        made: torch.Tensor = self._model(self._padded(rows.x), step)
        return made[: len(rows)]

    def close(self) -> None:
        """Nothing is held."""


class _PagedModel(TiledModel):
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
        super().__init__(model, slots, num_rows)
        self._x = inputs.new_zeros(num_rows, *inputs.shape[1:])
        self._given = torch.zeros(2, num_rows, dtype=torch.int64, device=inputs.device)
        self._given[0] = slots.padding_slot
        self._splits = slots.even_splits(num_rows)
        self._replay: Callable[[], torch.Tensor] | None = None
        self._graph: CapturedGraph | None = None
        if capturer is not None:
            with nothing_collected():
                self._graph = capturer.capture(self._launch)
            self._replay = partial(self._graph.replay, capturer.spans)

    def _of_tile(self, rows: _Rows, watch: Watch) -> torch.Tensor:
        count = len(rows)
        given = np.zeros((2, self.num_rows), dtype=np.int64)
        given[0] = self._slots.padding_slot
        given[:, :count] = rows.slots, rows.positions
        upload_into(self._given, torch.from_numpy(given))
        self._x[:count] = rows.x
        self._x[count:] = 0
        if self._replay is None or watch is not Watch.NOTHING:
            return self._launch(is_probed=watch is Watch.ALL)[:count]
        return self._replay()[:count].clone()

    def _launch(self, *, is_probed: bool = False) -> torch.Tensor:
        slots, positions = self._given
        step = self._slots.paged(slots, positions, None, is_probed=is_probed, splits=self._splits)
        made: torch.Tensor = self._model(self._x, step)
        return made

    def close(self) -> None:
        graph, self._graph, self._replay = self._graph, None, None
        if graph is not None:
            graph.close()


def _sizes(slots: Slots) -> list[int]:
    """That are tried, the largest first."""
    most = MOST_TILE_ROWS if slots.is_paged else MOST_GATHERED_ROWS
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
        tiled: TiledModel = (
            _PagedModel(model, slots, size, inputs, capturer())
            if slots.is_paged
            else _GatheredModel(model, slots, size)
        )
        found = _comparisons(tiled, inputs[: min(2, len(inputs) // size) * size], model.head)
        if all(_agree(mesh, is_same, inputs.device) for is_same in found):
            return tiled
        tiled.close()
    raise EngineError("this device gives no two equal results, so nothing on it is deterministic")


def _agree(mesh: Mesh, is_same: bool, device: torch.device) -> bool:
    """Whether it is on all ranks of the tensor group, which look at the same in the same order."""
    differs = torch.tensor([not is_same], device=device).long()
    return not mesh.tensor.all_reduce(differs).item()


def _comparisons(tiled: TiledModel, x: torch.Tensor, head: object) -> Iterator[bool]:
    """Whether a sequence in whole tiles is the same token by token, and in tiles with their rows in another order, and
    so are its logits, where there is a head."""
    rows = _Rows(x, np.zeros(len(x), dtype=np.int64), np.arange(len(x)))
    whole = tiled.of_rows(rows)
    single = [tiled.of_rows(rows[at : at + 1]) for at in rows.positions]
    yield torch.equal(whole, torch.cat(single))
    logits = None
    if head is not None:
        logits = tiled.logits(whole)
        yield torch.equal(logits, torch.cat([tiled.logits(row) for row in whole.split(1)]))
    tiles = rows.positions.reshape(-1, tiled.num_rows)
    for shift in range(1, tiled.num_rows):
        order = np.roll(tiles, shift, axis=1).ravel()
        yield torch.equal(whole[order], tiled.of_rows(rows[order]))
        if logits is not None:
            yield torch.equal(logits[order], tiled.logits(whole[order]))
