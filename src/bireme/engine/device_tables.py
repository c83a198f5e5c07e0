"""Block tables of the slots on a GPU, kept up to date by difference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bireme.kernels.host_copies import upload
from bireme.parallel.layout import CacheKind

Added = tuple[
    int, int, Sequence[Sequence[int]]
]  # slot, number of blocks that it had, new ones by kind


class DeviceTables:
    """`of[window]`: int32 [slots + 1, blocks]; the last row is of no request, and shows the null block."""

    def __init__(
        self,
        kinds: Sequence[CacheKind],
        windows: set[int | None],
        num_slots: int,
        max_blocks: int,
        device: torch.device,
    ) -> None:
        self._kinds, self._max_blocks, self._device = kinds, max_blocks, device
        self.of = {
            window: torch.zeros(num_slots + 1, max_blocks, dtype=torch.int32, device=device)
            for window in windows
        }

    def extend(self, added: Sequence[Added]) -> None:
        """In one copy to the device, without a host synchronisation."""
        at: list[int] = []  # in a table that is read row by row
        for slot, size, blocks in added:
            first = slot * self._max_blocks + size
            at += range(first, first + len(blocks[0]))
        if not at:
            return
        new = [
            [id_ for _, _, blocks in added for id_ in blocks[kind]]
            for kind in range(len(self._kinds))
        ]
        packed = torch.from_numpy(np.array([at, *new], dtype=np.int64))
        places, *by_kind = upload(packed, self._device).unbind(0)
        for kind, ids in zip(self._kinds, by_kind, strict=True):
            if kind.window in self.of:  # other stages may have layers of other kinds
                self.of[kind.window].view(-1).index_copy_(0, places, ids.int())
