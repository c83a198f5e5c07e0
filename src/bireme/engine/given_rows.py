"""What a captured graph is told of a step's rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from bireme.engine.slots import rows_of
from bireme.kernels.host_copies import upload_into
from bireme.kernels.query_tiles import Tiles, tiles_of
from bireme.request import ScheduledPiece


class GivenRows:
    """What a step's rows are, in one piece of int64 memory on the device, which may be that of other sizes too:
    `slots` and `positions` [rows]; of steps with prompts ids [rows], below 0 where the slot's last one is meant, and
    `most_tiles` tiles."""

    def __init__(self, memory: torch.Tensor, rows: int, most_tiles: int | None) -> None:
        self._rows, self._most_tiles = rows, most_tiles
        self._memory = memory[: self.num_words(rows, most_tiles)]
        self.slots, self.positions = self._memory[: 2 * rows].view(2, rows)
        self.ids = self.tiles = None
        if most_tiles is not None:
            self.ids = self._memory[2 * rows : 3 * rows]
            cut = self._memory[3 * rows :].view(torch.int32).view(most_tiles, 4)
            self.tiles = Tiles(cut, has_other_rows=True)

    @staticmethod
    def num_words(rows: int, most_tiles: int | None) -> int:
        return 2 * rows if most_tiles is None else 3 * rows + 2 * most_tiles

    def become(self, pieces: Sequence[ScheduledPiece], num_tokens: int, padding_slot: int) -> None:
        """From here on these, and rows of no request."""
        rows, packed = self._rows, np.zeros(len(self._memory), dtype=np.int64)
        packed[num_tokens:rows] = padding_slot
        packed[: 2 * rows].reshape(2, rows)[:, :num_tokens] = rows_of(pieces)
        if self._most_tiles is not None:
            given = chain.from_iterable(piece.token_ids or (-1,) for piece in pieces)
            packed[2 * rows : 2 * rows + num_tokens] = np.fromiter(given, np.int64, num_tokens)
            cut = tiles_of(
                [piece.start for piece in pieces], [piece.num_tokens for piece in pieces]
            )
            packed[3 * rows :].view(np.int32)[: cut.size] = cut.reshape(-1)
        upload_into(self._memory, torch.from_numpy(packed))

    def clear(self, padding_slot: int) -> None:
        """All rows of no request."""
        self._memory.zero_()
        self.slots.fill_(padding_slot)
