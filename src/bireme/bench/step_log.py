"""Every step as the engine tells it to the ranks, with what its queue and cache were at."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bireme.engine.engine import Engine
from bireme.engine.scheduler import Scheduler
from bireme.observe.profile_records import StepSample
from bireme.observe.rates import phase_of
from bireme.observe.timeline import Key
from bireme.parallel.operations import context_tokens
from bireme.request import ScheduledBatch


@dataclass(frozen=True, slots=True)
class _Noted:
    time_ns: int
    batch: ScheduledBatch
    num_running: int
    num_waiting: int
    cache_usage: float
    num_preemptions: int


class StepLog:
    """What a run was scheduled as; it holds every batch."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._before = scheduler.num_preemptions
        self._noted: list[_Noted] = []

    def note(self, batch: ScheduledBatch) -> None:
        scheduler = self._scheduler
        self._noted.append(
            _Noted(
                time.monotonic_ns(),
                batch,
                scheduler.num_running,
                scheduler.num_waiting,
                scheduler.blocks.usage,
                scheduler.num_preemptions - self._before,
            )
        )

    @property
    def num_steps(self) -> int:
        return len(self._noted)

    @property
    def batches(self) -> dict[Key, ScheduledBatch]:
        return {noted.batch.header: noted.batch for noted in self._noted}

    def samples(self, origin_ns: int) -> list[StepSample]:
        """Times from `origin_ns` of the monotonic clock on."""
        return [
            StepSample(
                step_id=noted.batch.step_id,
                time_s=(noted.time_ns - origin_ns) / 1e9,
                phase=phase_of(noted.batch),
                num_seqs=len(noted.batch.pieces),
                num_tokens=noted.batch.num_tokens,
                num_sampled=len(noted.batch.sampling_slots),
                context_tokens=context_tokens(noted.batch.pieces),
                num_running=noted.num_running,
                num_waiting=noted.num_waiting,
                cache_usage=noted.cache_usage,
                num_preemptions=noted.num_preemptions,
            )
            for noted in self._noted
        ]


@contextmanager
def logged(engine: Engine) -> Iterator[StepLog]:
    """The steps of what runs inside."""
    log = StepLog(engine.scheduler)
    engine.watcher = log.note
    try:
        yield log
    finally:
        engine.watcher = None
