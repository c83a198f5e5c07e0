"""An executor that answers from lists: for tests, and for whatever needs known tokens."""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Mapping, Sequence

from bireme.request import SamplingSetup, ScheduledBatch, StepMasks, StepOutput


def until_readable(fd: int) -> None:
    """Waits where nothing else can happen."""
    select.select([fd], [], [])


class ScriptedExecutor:
    """The request with seed s is given the ids of `script[s]`, one after another, and 0 behind them;
    also one that is computed again after a preemption."""

    def __init__(self, script: Mapping[int, Sequence[int]]) -> None:
        self._script = script
        self._setups: dict[int, SamplingSetup] = {}
        self._in_flight: deque[ScheduledBatch] = deque()
        self._masks: dict[int, StepMasks] = {}
        self.is_broken = False

    def submit(self, batch: ScheduledBatch) -> None:
        self._in_flight.append(batch)

    def give_masks(self, masks: StepMasks) -> None:
        self._masks[masks.step_id] = masks

    def give_up(self) -> None:
        self.is_broken = True

    def wait(self, wake: int) -> bool:
        if not self._in_flight:
            until_readable(wake)
        return bool(self._in_flight)

    def collect(self) -> StepOutput:
        batch = self._in_flight.popleft()
        for setup in batch.setups:
            self._setups[setup.slot] = setup.sampling
        if batch.masked_slots:
            del self._masks[batch.step_id]  # KeyError: a step would have waited for ever
        ids = [
            [self._id(piece.slot, piece.start + piece.num_tokens)]
            for piece in batch.pieces
            if piece.samples
        ]
        return StepOutput(*batch.header, batch.sampling_slots, ids)

    def _id(self, slot: int, position: int) -> int:
        setup = self._setups[slot]
        ids, index = self._script.get(setup.seed, ()), position - setup.num_prompt
        return ids[index] if index < len(ids) else 0
