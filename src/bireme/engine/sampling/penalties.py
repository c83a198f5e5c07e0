"""Penalties for what was said before: vLLM's, in its order.

Repetition divides the positive and multiplies the other logits of the prompt's and the output's
ids, then frequency and presence are subtracted from those of the output's.
Shapes: P penalised rows, L tokens of the longest, V local vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from bireme.engine.sampling.shard import Shard
from bireme.kernels.host_copies import upload
from bireme.request import SlotSetup

_NO_ID = -1
_BYTES_PER_LOGIT = 8  # two copies of a row in float32
_BYTES_PER_TOKEN = 64  # of temporaries for each token said: eight of 8 bytes


@dataclass(frozen=True)
class _Said:
    """A slot's tokens, int32 [max_len], as far as they are known; the first `num_prompt` are the
    prompt's. `strengths` float32 [3]: repetition, frequency, presence."""

    token_ids: torch.Tensor
    num_prompt: int
    strengths: torch.Tensor


class Penalties:
    """The tokens of the slots that have penalties, on the device, and what they cost."""

    def __init__(self, shard: Shard, workspace_bytes: int, device: torch.device) -> None:
        self._shard, self._workspace_bytes, self._device = shard, workspace_bytes, device
        self._said: dict[int, _Said] = {}

    def set_up(self, setup: SlotSetup) -> None:
        sampling = setup.sampling
        self._said.pop(setup.slot, None)
        if not sampling.has_penalties:
            return
        token_ids = torch.empty(setup.max_len, dtype=torch.int32, device=self._device)
        said = torch.tensor(sampling.token_ids, dtype=torch.int32)
        token_ids[: len(said)] = upload(said, self._device)
        strengths = torch.tensor(
            [sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty]
        )
        self._said[setup.slot] = _Said(
            token_ids, sampling.num_prompt, upload(strengths, self._device)
        )

    def __contains__(self, slot: int) -> bool:
        return slot in self._said

    def append(self, slots: Sequence[int], positions: Sequence[int], ids: torch.Tensor) -> None:
        """Takes the id [S] that each slot got at its position; one behind a slot's end is surplus."""
        for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
            said = self._said.get(slot)
            if said is not None and position < len(said.token_ids):
                said.token_ids[position] = ids[row]

    def apply(self, logits: torch.Tensor, slots: Sequence[int], positions: Sequence[int]) -> None:
        """Changes the rows [S, V] of slots that have penalties; each has `position` tokens so far."""
        rows = [row for row, slot in enumerate(slots) if slot in self._said]
        if not rows:
            return
        longest = max(positions[row] for row in rows)
        row_bytes = _BYTES_PER_LOGIT * logits.shape[1] + _BYTES_PER_TOKEN * longest
        num_at_once = max(1, self._workspace_bytes // row_bytes)
        for start in range(0, len(rows), num_at_once):
            tile = rows[start : start + num_at_once]
            said = [self._said[slots[row]] for row in tile]
            self._apply(logits, tile, said, [positions[row] for row in tile])

    def _apply(
        self, logits: torch.Tensor, rows: list[int], said: list[_Said], lengths: list[int]
    ) -> None:
        spare = logits.shape[1]  # one more column, where the ids of other shards go
        everything = [each.token_ids[:length] for each, length in zip(said, lengths, strict=True)]
        ids = pad_sequence(everything, batch_first=True, padding_value=_NO_ID).long()  # [P, L]
        columns = self._shard.columns_or(ids, spare)
        numbers = torch.tensor([rows, [each.num_prompt for each in said]])
        index, num_prompt = upload(numbers, logits.device)
        is_prompt = torch.arange(ids.shape[1], device=ids.device) < num_prompt.unsqueeze(1)
        output = columns.masked_fill(is_prompt, spare)
        strengths = torch.stack([each.strengths for each in said]).unsqueeze(2)
        repetition, frequency, presence = strengths.unbind(1)  # [P, 1] each

        # an id that was said twice is written twice, with the same value
        padded = F.pad(logits[index], (0, 1))
        seen = padded.gather(1, columns)
        padded.scatter_(1, columns, torch.where(seen > 0, seen / repetition, seen * repetition))
        padded.scatter_add_(1, output, -frequency.expand(output.shape))
        padded.scatter_(1, output, padded.gather(1, output) - presence)
        logits[index] = padded[:, :spare]
