"""What the slots ask of a draw, kept on the device, and the groups in which a step's rows are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch

from bireme.engine.sampling.choosing import Draws, RowGroup
from bireme.kernels.host_copies import upload
from bireme.request import SamplingSetup, SlotSetup


class _Kind(IntEnum):
    GREEDY = 0
    RANDOM = 1
    FILTERED = 2

    @classmethod
    def of(cls, sampling: SamplingSetup) -> _Kind:
        if sampling.temperature == 0:
            return cls.GREEDY
        is_filtered = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        return cls.FILTERED if is_filtered else cls.RANDOM


class SlotColumns:
    """Rows of greedy slots cost nothing; rows that do not filter are not filtered beside others."""

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self._device = device
        self._setups: dict[int, tuple[_Kind, SamplingSetup]] = {}
        self._whole = torch.zeros(num_slots, 3, dtype=torch.int64, device=device)
        self._real = torch.zeros(num_slots, 3, dtype=torch.float32, device=device)

    def set_up(self, setups: Sequence[SlotSetup]) -> None:
        for setup in setups:
            self._setups[setup.slot] = _Kind.of(setup.sampling), setup.sampling
        drawn = [setup for setup in setups if setup.sampling.temperature > 0]
        if not drawn:
            return
        slots = upload(torch.tensor([setup.slot for setup in drawn]), self._device)
        asked = [setup.sampling for setup in drawn]
        whole = torch.tensor([(each.seed, each.choice, each.top_k) for each in asked])
        real = torch.tensor([(each.temperature, each.top_p, each.min_p) for each in asked])
        self._whole[slots] = upload(whole, self._device)
        self._real[slots] = upload(real.float(), self._device)

    def are_greedy(self, slots: Sequence[int]) -> bool:
        return all(self._setups[slot][0] is _Kind.GREEDY for slot in slots)

    def groups(
        self, slots: Sequence[int], on_device: torch.Tensor, positions: torch.Tensor
    ) -> list[RowGroup]:
        """Of rows whose slots are `slots`, int64 [S] `on_device` too, and their tokens' positions."""
        kinds = [self._setups[slot][0] for slot in slots]
        groups = []
        for kind in sorted(set(kinds)):
            members = [row for row, other in enumerate(kinds) if other is kind]
            rows: torch.Tensor | slice = slice(None)
            if len(members) < len(slots):
                rows = upload(torch.tensor(members), self._device)
            draws = None
            if kind is not _Kind.GREEDY:
                asked = [self._setups[slots[row]][1] for row in members]
                draws = self._draws(asked, on_device[rows], positions[rows])
            groups.append(RowGroup(rows, draws))
        return groups

    def _draws(
        self, asked: Sequence[SamplingSetup], slots: torch.Tensor, positions: torch.Tensor
    ) -> Draws:
        seeds, choices, top_k = self._whole[slots].unbind(1)
        temperature, top_p, min_p = self._real[slots].unbind(1)
        return Draws(
            temperature, top_k, top_p, min_p, seeds, choices, positions,
            has_top_k=any(each.top_k > 0 for each in asked),
            has_top_p=any(each.top_p < 1 for each in asked),
            has_min_p=any(each.min_p > 0 for each in asked),
        )  # fmt: skip
