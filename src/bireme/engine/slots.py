"""What a rank knows of the requests in its slots, and what a step's layers must know of them.

Shapes: T tokens of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bireme.engine.device_tables import DeviceTables
from bireme.engine.gathering import Gathering, Workspace
from bireme.kernels.choice import has_kernels
from bireme.kernels.context_splits import ContextSplits
from bireme.kernels.host_copies import upload
from bireme.kernels.query_tiles import Tiles
from bireme.kernels.tiled_attention import SPLIT
from bireme.kvcache.paged_cache import PagedCache
from bireme.model_config import RopeConfig
from bireme.models.rope import depends_on_length, inverse_frequencies
from bireme.models.step import Asked, PagedStep, StepContext, Tile
from bireme.parallel.layout import CacheKind
from bireme.request import (
    SamplingSetup,
    ScheduledBatch,
    ScheduledPiece,
    SlotSetup,
    asked_rows,
    asked_tokens,
)


@dataclass(frozen=True)
class CacheShape:
    """How much cache a rank has: blocks of `block_size` places, for `num_slots` requests."""

    kinds: tuple[CacheKind, ...]
    block_size: int
    num_slots: int
    max_model_len: int

    def num_blocks(self, window: int | None) -> int:
        return next(kind.num_blocks for kind in self.kinds if kind.window == window)


def rows_of(pieces: Sequence[ScheduledPiece]) -> NDArray[np.int64]:
    """[2, T]: slot and position of every token of a step."""
    columns = np.array([(piece.slot, piece.start, piece.num_tokens) for piece in pieces])
    slots, starts, counts = columns.T
    first_rows = counts.cumsum() - counts
    positions = np.arange(counts.sum()) + np.repeat(starts - first_rows, counts)
    return np.stack((np.repeat(slots, counts), positions))


class Slots:
    """Block tables of the slots, kept on the host, and steps made of them."""

    def __init__(
        self,
        shape: CacheShape,
        rope: RopeConfig | None,
        workspace: Workspace,
        caches: dict[int, PagedCache],
        windows: set[int | None],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._shape, self._rope, self._caches = shape, rope, caches
        self._dtype, self._device = dtype, device
        max_blocks = -(-shape.max_model_len // shape.block_size)
        self._tables: dict[int | None, NDArray[np.int64]] = {
            window: np.zeros((shape.num_slots, max_blocks), dtype=np.int64) for window in windows
        }
        self._table_sizes = [0] * shape.num_slots
        self._gathering = Gathering(self._tables, shape.block_size, workspace, device)
        self._on_device: DeviceTables | None = None
        if has_kernels(device):
            self._on_device = DeviceTables(
                shape.kinds, windows, shape.num_slots, max_blocks, device
            )
        self._has_own_frequencies = rope is not None and depends_on_length(rope)
        self._frequencies: torch.Tensor | None = None
        if rope is not None:
            rows = shape.num_slots + 1 if self._has_own_frequencies else 1  # padding has one too
            frequencies = inverse_frequencies(rope, shape.max_model_len)
            self._frequencies = frequencies.repeat(rows, 1).to(device)

    @property
    def is_paged(self) -> bool:
        """Whether the kernels of a GPU find contexts by tables that lie there."""
        return self._on_device is not None

    @property
    def num_places(self) -> int:
        """Tokens that one request can have in every layer at once."""
        fewest = min((kind.num_blocks - 1 for kind in self._shape.kinds), default=0)
        return min(self._shape.max_model_len, fewest * self._shape.block_size)

    def try_on(self, num_tokens: int) -> None:
        """Gives slot 0 the first blocks of the cache, which no request has yet."""
        self._set_up(SlotSetup(0, num_tokens, SamplingSetup(seed=0)))
        blocks = list(range(1, 1 - (-num_tokens // self._shape.block_size)))
        self._extend([(0, [blocks] * len(self._shape.kinds))])

    def apply(self, batch: ScheduledBatch) -> None:
        """Takes new requests in, and the blocks that the batch's pieces got."""
        for setup in batch.setups:
            self._set_up(setup)
        self._extend([(it.slot, it.new_blocks) for it in batch.pieces if it.new_blocks])

    def _extend(self, new: Sequence[tuple[int, list[list[int]]]]) -> None:
        if self._on_device is not None:
            sized = [(slot, self._table_sizes[slot], blocks) for slot, blocks in new]
            self._on_device.extend(sized)
        for slot, blocks in new:
            self._extend_one(slot, blocks)

    def _extend_one(self, slot: int, new_blocks: list[list[int]]) -> None:
        size, added = self._table_sizes[slot], len(new_blocks[0])
        for kind, blocks in zip(self._shape.kinds, new_blocks, strict=True):
            if kind.window in self._tables:  # other stages may have layers of other kinds
                self._tables[kind.window][slot, size : size + added] = blocks
        self._table_sizes[slot] = size + added

    def _set_up(self, setup: SlotSetup) -> None:
        self._table_sizes[setup.slot] = 0
        if self._has_own_frequencies and self._frequencies is not None and self._rope is not None:
            frequencies = inverse_frequencies(self._rope, setup.max_len)
            self._frequencies[setup.slot] = upload(frequencies, self._device)

    # --- a step's context ----------------------------------------------------------------------

    def context(
        self,
        pieces: list[ScheduledPiece],
        *,
        is_probed: bool = False,
        asks_all: bool = True,
    ) -> StepContext:
        """`is_probed`: somebody wants to see what every module makes. Without `asks_all` the last layer makes no other
        rows than `asked_rows`."""
        slots, positions = rows = rows_of(pieces)
        asked = None if asks_all else np.array(asked_rows(pieces))
        if self._on_device is not None:
            given = self._upload(rows)
            step = self.paged(given[0], given[1], self._tiles(pieces), is_probed=is_probed)
            if asked is not None:
                at = self._upload(asked)
                step.asked = Asked(at, self.paged(given[0][at], given[1][at], None))
            return step
        step = self._gathered(pieces, slots, positions)
        if asked is not None:
            alone = self._gathered(asked_tokens(pieces), slots[asked], positions[asked])
            step.asked = Asked(self._upload(asked), alone)
        return step

    def _upload(self, numbers: NDArray[Any]) -> torch.Tensor:
        return upload(torch.from_numpy(numbers), self._device)

    def _gathered(
        self,
        pieces: list[ScheduledPiece],
        slots: NDArray[np.int64],
        positions: NDArray[np.int64],
    ) -> StepContext:
        """By groups, whose contexts are gathered."""
        on_device = self._upload(positions)
        cos, sin = self._rotation(slots, on_device)
        return StepContext(
            positions=on_device,
            places=self._gathering.places(slots, positions),
            groups=self._gathering.groups(pieces),
            caches=self._caches,
            cos=cos,
            sin=sin,
        )

    def _tiles(self, pieces: list[ScheduledPiece]) -> Tiles | None:
        """None where each sequence has one new token."""
        if all(piece.num_tokens == 1 for piece in pieces):
            return None
        starts, counts = zip(*((piece.start, piece.num_tokens) for piece in pieces), strict=True)
        return Tiles.of(starts, counts, self._device)

    @property
    def padding_slot(self) -> int:
        """Of rows that are no request's: what they write is read by nobody."""
        return self._shape.num_slots

    def paged(
        self,
        slots: torch.Tensor,
        positions: torch.Tensor,
        tiles: Tiles | None,
        *,
        is_probed: bool = False,
        splits: dict[int | None, ContextSplits] | None = None,
    ) -> StepContext:
        """Of rows at `positions` [T] of `slots` [T]; on the device alone, so that it can be captured. Contexts of
        single new tokens are split by their lengths, unless `splits`, by window, are given."""
        assert self._on_device is not None
        size, tables = self._shape.block_size, self._on_device.of
        blocks, offsets = positions // size, positions % size
        cos, sin = self._rotation(slots, positions)
        return StepContext(
            positions=positions,
            places={
                window: table[slots, blocks] * size + offsets for window, table in tables.items()
            },
            groups=[],
            caches=self._caches,
            cos=cos,
            sin=sin,
            paged=PagedStep(
                slots, tables, size, tiles, self._splits(positions, tiles) if splits is None else splits, is_probed
            ),
        )  # fmt: skip

    def _splits(
        self, positions: torch.Tensor, tiles: Tiles | None
    ) -> dict[int | None, ContextSplits]:
        """By the layers' window, of the contexts of single new tokens."""
        from bireme.kernels.gpu.split_contexts import split_contexts

        singles = positions if tiles is None else positions[: tiles.num_singles]
        if not len(singles):
            return {}
        return {window: split_contexts(singles, *self._heads, window) for window in self._tables}

    def even_splits(self, num_rows: int) -> dict[int | None, ContextSplits]:
        """The same for so many new tokens, whatever their contexts."""
        from bireme.kernels.gpu.split_contexts import even_splits

        return dict.fromkeys(self._tables, even_splits(num_rows, *self._heads, self._device))

    @property
    def _heads(self) -> tuple[int, int]:
        """KV heads and their size, as in every layer."""
        _, num_kv_heads, head_dim = next(iter(self._caches.values())).keys.shape
        return num_kv_heads, head_dim

    def tile(
        self, slots: NDArray[np.int64], positions: NDArray[np.int64], num_rows: int
    ) -> StepContext:
        """Of rows at positions of slots, padded to `num_rows` with rows that see one place."""
        num_real = len(slots)
        padding = (0, num_rows - num_real)
        slots, positions = np.pad(slots, padding), np.pad(positions, padding)
        num_context = -(-int(positions.max() + 1) // SPLIT) * SPLIT
        context = np.arange(num_context)[None]
        newest = np.where(np.arange(num_rows) < num_real, positions, -1)[:, None]
        last = self._shape.max_model_len - 1
        on_device = self._upload(positions)
        cos, sin = self._rotation(slots, on_device)
        return StepContext(
            positions=on_device,
            places=self._gathering.places(slots[:num_real], positions[:num_real]),
            groups=[],
            caches=self._caches,
            cos=cos,
            sin=sin,
            tile=Tile(
                on_device,
                self._gathering.context(
                    slots[:, None], np.minimum(context, last), positions[:, None], newest
                ),
            ),
        )

    def _rotation(
        self, slots: NDArray[np.int64] | torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self._frequencies is None or self._rope is None:
            return None, None
        frequencies = self._frequencies[slots] if self._has_own_frequencies else self._frequencies
        angles = positions.float().unsqueeze(1) * frequencies
        scale = self._rope.attention_factor
        return (angles.cos() * scale).to(self._dtype), (angles.sin() * scale).to(self._dtype)
