"""The engine's step: schedule, submit, collect, update. It knows ids and lengths, never text."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bireme.engine.interrupt import deferred_interrupts
from bireme.engine.scheduler import RunningRequest, Scheduler
from bireme.request import Executor, Request


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """New tokens of one request; `finish_reason` is set with its last ones. Seconds, monotonic."""

    request_id: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | None
    time_s: float


class Engine:
    """Runs requests through an executor, keeping as many batches in flight as the scheduler allows."""

    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        self.scheduler, self._executor = scheduler, executor

    def run(self, requests: list[Request]) -> Iterator[TokenEvent]:
        """Yields tokens as they come, until all requests have ended.

        If the caller stops early, what is in flight is collected and the engine stays usable. Ctrl-C
        waits for the end of a step, never for the caller's code between two.
        """
        for request in requests:
            self.scheduler.add(request)
        try:
            while self.scheduler.has_unfinished:
                with self._whole_step():
                    events = self._step()
                yield from events
        finally:
            with self._whole_step():
                self._settle()

    @contextmanager
    def _whole_step(self) -> Iterator[None]:
        """The first Ctrl-C waits for the end; a second one ends the ranks, amid whatever they do."""
        with deferred_interrupts():
            try:
                yield
            except KeyboardInterrupt:
                self._executor.give_up()
                raise

    def _step(self) -> list[TokenEvent]:
        while (batch := self.scheduler.schedule()) is not None:
            self._executor.submit(batch)
        news = self.scheduler.update(self._executor.collect())
        now = time.monotonic()
        return [self._event(run, ids, now) for run, ids in news]

    @staticmethod
    def _event(run: RunningRequest, ids: list[int], now: float) -> TokenEvent:
        return TokenEvent(run.request.request_id, ids, run.finish_reason, run.stop_reason, now)

    def _settle(self) -> None:
        """Collects what is still in flight: surplus tokens, or all of an interrupted run."""
        self.scheduler.abort_all()
        if self._executor.is_broken or sys.is_finalizing():
            return
        while self.scheduler.num_in_flight:
            self.scheduler.update(self._executor.collect())
        self.scheduler.blocks.check_integrity()
