"""Devices that are only timed: steps take what a function says, on a clock that nobody waits for.

Each stage works on one step at a time, in order; a step reaches a stage when the one before has
done it; the first stage also waits for the ids that its decodes go on from. The engine cannot tell.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from bireme.engine.scripted import until_readable
from bireme.request import ScheduledBatch, StepMasks, StepOutput


class VirtualClock:
    """Seconds that pass when something says so."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def __call__(self) -> float:
        return self._now_s

    def advance_to(self, time_s: float) -> None:
        """Never backwards."""
        self._now_s = max(self._now_s, time_s)


@dataclass(frozen=True, slots=True)
class StageWork:
    """When a stage was at a step, and since when it had nothing else to wait for than that step's
    ids: `waited_s` of the time before `start_s`."""

    stage: int
    step_id: int
    start_s: float
    end_s: float
    waited_s: float


class SimulatedExecutor:
    """`seconds(stage, batch)` is how long a stage takes for a batch. Every id is `token_id`; `note`
    is told what each stage did, in order."""

    def __init__(
        self,
        num_stages: int,
        seconds: Callable[[int, ScheduledBatch], float],
        clock: VirtualClock,
        token_id: int = 0,
        note: Callable[[StageWork], None] = lambda _: None,
    ) -> None:
        self._seconds, self._clock, self._token_id, self._note = seconds, clock, token_id, note
        self._submitted: deque[tuple[ScheduledBatch, float]] = deque()
        self._masked_s: dict[int, float] = {}
        self._free_s = [0.0] * num_stages
        self._sampled_s: dict[int, float] = {}  # by slot
        self.is_broken = False

    def submit(self, batch: ScheduledBatch) -> None:
        self._submitted.append((batch, self._clock()))

    def give_masks(self, masks: StepMasks) -> None:
        self._masked_s[masks.step_id] = self._clock()

    def give_up(self) -> None:
        self.is_broken = True

    def wait(self, wake: int) -> bool:
        if not self._submitted:
            until_readable(wake)
        return bool(self._submitted)

    def collect(self) -> StepOutput:
        """Takes the clock to the end of the oldest step."""
        batch, submitted_s = self._submitted.popleft()
        ready_s = self._run(batch, submitted_s)
        if batch.masked_slots:
            ready_s = max(ready_s, self._masked_s.pop(batch.step_id))
            self._free_s[-1] = ready_s
        for slot in batch.sampling_slots:
            self._sampled_s[slot] = ready_s
        self._clock.advance_to(ready_s)
        ids = [[self._token_id] for _ in batch.sampling_slots]
        return StepOutput(*batch.header, batch.sampling_slots, ids)

    def _run(self, batch: ScheduledBatch, submitted_s: float) -> float:
        known_s = [self._sampled_s[p.slot] for p in batch.pieces if p.token_ids is None]
        arrived_s = submitted_s
        for stage, free_s in enumerate(self._free_s):
            could_start_s = max(free_s, arrived_s)
            start_s = max(could_start_s, *known_s) if stage == 0 and known_s else could_start_s
            end_s = start_s + self._seconds(stage, batch)
            waited_s = start_s - could_start_s
            self._note(StageWork(stage, batch.step_id, start_s, end_s, waited_s))
            self._free_s[stage] = arrived_s = end_s
        return arrived_s
