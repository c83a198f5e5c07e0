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
        count, num_kinds = len(at), len(self._kinds)
        packed = np.empty((num_kinds + 2) * count, dtype=np.int32)
        packed[: 2 * count].view(np.int64)[:] = at
        packed[2 * count :] = [
            id_ for kind in range(num_kinds) for *_, blocks in added for id_ in blocks[kind]
        ]
        given = upload(torch.from_numpy(packed), self._device)
        places = given[: 2 * count].view(torch.int64)
        for index, kind in enumerate(self._kinds, start=2):
            if kind.window in self.of:  # other stages may have layers of other kinds
                ids = given[index * count : (index + 1) * count]
                self.of[kind.window].view(-1).index_copy_(0, places, ids)
