"""What is done to logits before an id is chosen: biases, penalties, bans, masks, in this order.

vLLM's order, but for bans and masks, which it applies first: -inf stays -inf, so that is the same.
Shapes: S sampled rows, V local vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from bireme.engine.sampling.penalties import Penalties
from bireme.engine.sampling.shard import Shard
from bireme.kernels.host_copies import upload
from bireme.request import SlotSetup

_BYTES_PER_MASKED_LOGIT = 16  # a number to add, twice, and an eighth of an index

# [256, 8]: what each byte of a mask adds to its eight logits
_ADDENDS = torch.where(
    torch.from_numpy(
        np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    ).bool(),
    0.0,
    float("-inf"),
)


@dataclass(frozen=True)
class _Edits:
    """Columns of this shard that a slot's biases and bans touch: int64, and float32 of each bias."""

    biased: torch.Tensor
    biases: torch.Tensor
    stops: torch.Tensor
    min_len: int

    def touch(self, position: int) -> bool:
        return len(self.biased) > 0 or position < self.min_len


class Adjustments:
    """What the slots ask for; most slots ask for nothing and cost nothing."""

    def __init__(self, shard: Shard, workspace_bytes: int, device: torch.device) -> None:
        self._shard, self._device, self._workspace_bytes = shard, device, workspace_bytes
        self._addends = _ADDENDS.to(device)
        self._penalties = Penalties(shard, workspace_bytes, device)
        self._edits: dict[int, _Edits] = {}

    def set_up(self, setup: SlotSetup) -> None:
        sampling = setup.sampling
        self._penalties.set_up(setup)
        self._edits.pop(setup.slot, None)
        if not sampling.logit_bias and not (sampling.stop_ids and sampling.min_len):
            return
        here = [(id_, bias) for id_, bias in sampling.logit_bias if self._shard.holds(id_)]
        biased = self._shard.columns(id_ for id_, _ in here)
        stops = self._shard.columns(sampling.stop_ids)
        self._edits[setup.slot] = _Edits(
            upload(torch.tensor(biased, dtype=torch.int64), self._device),
            upload(torch.tensor([bias for _, bias in here], dtype=torch.float32), self._device),
            upload(torch.tensor(stops, dtype=torch.int64), self._device),
            sampling.min_len,
        )

    def touch(self, slots: Sequence[int], positions: Sequence[int]) -> bool:
        """True if anything is to be changed for the tokens of these positions."""
        return any(
            slot in self._penalties or (slot in self._edits and self._edits[slot].touch(position))
            for slot, position in zip(slots, positions, strict=True)
        )

    def apply(self, logits: torch.Tensor, slots: Sequence[int], positions: Sequence[int]) -> None:
        """Changes logits [S, V] of slots that are about to get the token of that position."""
        edited = [
            (logits[row], self._edits[slot], position)
            for row, (slot, position) in enumerate(zip(slots, positions, strict=True))
            if slot in self._edits and self._edits[slot].touch(position)
        ]
        for own, edits, _ in edited:
            own.index_add_(0, edits.biased, edits.biases)
        self._penalties.apply(logits, slots, positions)
        for own, edits, position in edited:
            if position < edits.min_len:
                own.index_fill_(0, edits.stops, float("-inf"))

    def append(self, slots: Sequence[int], positions: Sequence[int], ids: torch.Tensor) -> None:
        """Takes the ids [S] that were chosen for these positions."""
        self._penalties.append(slots, positions, ids)

    def apply_masks(
        self, logits: torch.Tensor, rows: Sequence[int], masks: Sequence[bytes]
    ) -> None:
        """Forbids ids in some rows of logits [S, V]; bit i % 8 of byte i // 8 of a row's mask allows i."""
        num_at_once = max(1, self._workspace_bytes // (_BYTES_PER_MASKED_LOGIT * logits.shape[1]))
        skipped = self._shard.first_id % 8
        for start in range(0, len(rows), num_at_once):
            tile = slice(start, start + num_at_once)
            packed = torch.from_numpy(_packed(masks[tile], self._shard, logits.shape[1]))
            added = F.embedding(upload(packed, self._device).int(), self._addends).flatten(1)
            added = added[:, skipped : skipped + logits.shape[1]]
            if len(added) == len(logits):
                logits += added
            else:
                logits.index_add_(0, upload(torch.tensor(rows[tile]), self._device), added)


def _packed(
    masks: Sequence[bytes], shard: Shard, width: int
) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """The bytes that have the bits of this shard's columns, a row a mask; behind a mask's end nothing
    is allowed."""
    first = shard.first_id // 8
    packed = np.zeros((len(masks), -(-(shard.first_id + width) // 8) - first), dtype=np.uint8)
    for own, mask in zip(packed, masks, strict=True):
        given = np.frombuffer(mask, dtype=np.uint8)[first : first + len(own)]
        own[: len(given)] = given
    return packed
