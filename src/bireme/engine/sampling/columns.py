"""What the slots ask of the choice of their ids, kept on the device, and how a step's rows are chosen together."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch

from bireme.engine.sampling.choosing import RowGroup
from bireme.kernels.draws import Draws
from bireme.kernels.host_copies import upload
from bireme.request import SamplingSetup, SlotSetup


class ChoiceKind(IntEnum):
    """What makes a choice of a later kind can make one of an earlier kind too."""

    GREEDY = 0
    RANDOM = 1
    TOP_P = 2  # and min-p
    TOP_K = 3

    @classmethod
    def of(cls, sampling: SamplingSetup) -> ChoiceKind:
        if sampling.temperature == 0:
            return cls.GREEDY
        if sampling.top_k > 0:
            return cls.TOP_K
        return cls.TOP_P if sampling.top_p < 1 or sampling.min_p > 0 else cls.RANDOM


class SlotColumns:
    """Of slots [0, num_slots], the last of which no request has: it is greedy."""

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self._device = device
        self._setups: dict[int, tuple[ChoiceKind, SamplingSetup]] = {}
        self._whole = torch.zeros(3, num_slots + 1, dtype=torch.int64, device=device)
        self._real = torch.zeros(3, num_slots + 1, dtype=torch.float32, device=device)
        self.no_slot = torch.full((1,), num_slots, device=device)

    def set_up(self, setups: Sequence[SlotSetup]) -> None:
        changed = []
        for setup in setups:
            kind, before = ChoiceKind.of(setup.sampling), self._kind(setup.slot)
            self._setups[setup.slot] = kind, setup.sampling
            if max(kind, before) > ChoiceKind.GREEDY:
                changed.append(setup)
        if not changed:
            return
        slots = upload(torch.tensor([setup.slot for setup in changed]), self._device)
        asked = [setup.sampling for setup in changed]
        whole = torch.tensor([(each.seed, each.choice, each.top_k) for each in asked])
        real = torch.tensor([(each.temperature, each.top_p, each.min_p) for each in asked])
        self._whole[:, slots] = upload(whole.t().contiguous(), self._device)
        self._real[:, slots] = upload(real.float().t().contiguous(), self._device)

    def kind(self, slots: Sequence[int]) -> ChoiceKind:
        """That makes the choice of all of these."""
        return max(self._kind(slot) for slot in slots)

    def _kind(self, slot: int) -> ChoiceKind:
        return self._setups[slot][0] if slot in self._setups else ChoiceKind.GREEDY

    def draws(
        self, kind: ChoiceKind, on_device: torch.Tensor, positions: torch.Tensor
    ) -> Draws | None:
        """Of rows of slots int64 [S] `on_device`, of no later kind, and their tokens' positions; greedy ones have
        temperature 0. Nothing is asked of the host: it may be part of a graph."""
        if kind is ChoiceKind.GREEDY:
            return None
        is_filtered = kind >= ChoiceKind.TOP_P
        return self._draws(on_device, positions, kind is ChoiceKind.TOP_K, is_filtered, is_filtered)

    def groups(
        self, slots: Sequence[int], on_device: torch.Tensor, positions: torch.Tensor
    ) -> list[RowGroup]:
        """Of rows whose slots are `slots`, int64 [S] `on_device` too, and their tokens' positions. Rows of greedy slots
        cost nothing; rows that do not filter are not filtered beside others."""
        kinds = [self._setups[slot][0] for slot in slots]
        groups = []
        for kind in sorted(set(kinds)):
            members = [row for row, other in enumerate(kinds) if other is kind]
            rows: torch.Tensor | slice = slice(None)
            if len(members) < len(slots):
                rows = upload(torch.tensor(members), self._device)
            draws = None
            if kind is not ChoiceKind.GREEDY:
                asked = [self._setups[slots[row]][1] for row in members]
                draws = self._draws(
                    on_device[rows], positions[rows],
                    any(each.top_k > 0 for each in asked), any(each.top_p < 1 for each in asked),
                    any(each.min_p > 0 for each in asked),
                )  # fmt: skip
            groups.append(RowGroup(rows, draws))
        return groups

    def _draws(self, slots: torch.Tensor, positions: torch.Tensor, *has_filters: bool) -> Draws:
        seeds, choices, top_k = self._whole.index_select(1, slots)
        temperature, top_p, min_p = self._real.index_select(1, slots)
        return Draws(temperature, top_k, top_p, min_p, seeds, choices, positions, *has_filters)
