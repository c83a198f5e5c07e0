"""The engine's step: schedule, submit, collect, update. It knows ids and lengths, never text."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import msgspec

from bireme.engine.driver_spans import DriverSpans
from bireme.engine.garbage import old_objects_left_out
from bireme.engine.interrupt import deferred_interrupts
from bireme.engine.request_state import News, RequestState
from bireme.engine.scheduler import Scheduler
from bireme.errors import EngineError
from bireme.request import (
    Executor,
    PromptLogprobs,
    Request,
    ScheduledBatch,
    StepHeader,
    StepMasks,
    TokenLogprobs,
)
from bireme.trace import SpanKind, SpanRing


class TokenEvent(msgspec.Struct, frozen=True):
    """New tokens of one request; `finish_reason` is set with its last ones. Seconds of the engine's
    clock. `logprobs` is empty, or one a token."""

    request_id: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None
    time_s: float
    logprobs: list[TokenLogprobs] = msgspec.field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None
    num_cached_tokens: int = 0
    scheduled_s: float | None = None  # when its first step was; None: never


class Matcher(Protocol):
    """What a request's text must match, as far as it has got."""

    def accept(self, token_ids: list[int]) -> None:
        """Goes on by these ids; EngineError where it cannot."""
        ...

    def mask(self) -> bytes:
        """The ids that may come next, as in `StepMasks`."""
        ...

    @property
    def is_stopped(self) -> bool:
        """True once nothing may follow."""
        ...


@dataclass(frozen=True, slots=True)
class _Masked:
    """A step in flight that waits for masks: slots, their requests, and the tokens that each must
    know before its mask can be made."""

    batch: ScheduledBatch
    waiting: list[tuple[int, RequestState, int]]


class Engine:
    """Runs requests through an executor, keeping as many batches in flight as the scheduler allows."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        clock: Callable[[], float] = time.monotonic,
        spans: SpanRing | None = None,
    ) -> None:
        self.scheduler, self.clock, self._executor = scheduler, clock, executor
        self._spans = None if spans is None else DriverSpans(spans)
        self.watcher: Callable[[ScheduledBatch], None] | None = None  # is told of every step
        self._matchers: dict[str, Matcher] = {}
        self._masked: deque[_Masked] = deque()

    def add(self, request: Request, matcher: Matcher | None = None) -> None:
        """Lets a request wait for its turn. CapacityError where the queue is full."""
        self.scheduler.add(request)
        if matcher is not None:
            self._matchers[request.request_id] = matcher

    def abort(self, request_id: str) -> None:
        """Ends a request before the next step is scheduled; nothing more is said of it."""
        self.scheduler.abort(request_id)
        self._matchers.pop(request_id, None)

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    def step(self, wake: int | None = None) -> list[TokenEvent]:
        """Submits what can be, and takes the oldest step's tokens. Ends requests whose time is up.

        Where more could be submitted, it returns early once the descriptor `wake` is readable.
        """
        events = [self._event(News(state, [], [])) for state in self._expired()]
        while (batch := self.scheduler.schedule()) is not None:
            self._note_begun(batch)
            if self.watcher is not None:
                self.watcher(batch)
            with self._span(SpanKind.SUBMIT, batch.header):
                self._executor.submit(batch)
            self._await_masks(batch)
        self._give_masks()
        if self.scheduler.num_in_flight and self._is_worth_waiting(wake):
            with self._span(SpanKind.WAIT):
                output = self._executor.collect()
            news = self.scheduler.update(output)
            events += [self._event(self._matched(item)) for item in news]
            self._give_masks()  # before the caller does whatever it does with the tokens
        return events

    def _note_begun(self, batch: ScheduledBatch) -> None:
        """After a preemption a request begins again, but its wait was over before."""
        for setup in batch.setups:
            state = self.scheduler.state_in(setup.slot)
            if state.scheduled_s is None:
                state.scheduled_s = self.clock()

    def _is_worth_waiting(self, wake: int | None) -> bool:
        scheduler = self.scheduler
        if wake is None or scheduler.num_in_flight >= scheduler.max_in_flight:
            return True
        with self._span(SpanKind.WAIT):
            return self._executor.wait(wake)

    def wait_while_idle(self, wake: int) -> None:
        """Where there is nothing to do, until the descriptor `wake` is readable; EngineError as soon as a
        rank is gone."""
        if not self.has_unfinished and not self.scheduler.num_in_flight:
            with self._span(SpanKind.EMPTY):
                self._executor.wait(wake)

    def _span(
        self, kind: SpanKind, header: StepHeader | None = None
    ) -> AbstractContextManager[None]:
        """What the ledger asks of the engine itself: when it told of a step, waited, had no request."""
        if self._spans is None:
            return nullcontext()
        return self._spans.span(kind, header)

    def run(self, requests: Iterable[tuple[Request, Matcher | None]]) -> Iterator[TokenEvent]:
        """Yields tokens as they come, until all requests have ended; no more wait than may.

        If the caller stops early, what is in flight is collected and the engine stays usable. Ctrl-C
        waits for the end of a step, never for the caller's code between two.
        """
        left = iter(requests)
        if self._spans is not None:
            self._spans.was_empty()
        try:
            self._feed(left)
            if self.has_unfinished:  # the first tokens wait for no collection
                yield from self._stepped(left)
            with old_objects_left_out():
                while self.has_unfinished:
                    yield from self._stepped(left)
        finally:
            with self._whole_step():
                self.settle()

    def _stepped(self, left: Iterator[tuple[Request, Matcher | None]]) -> list[TokenEvent]:
        with self._whole_step():
            events = self.step()
        self._feed(left)
        return events

    def _feed(self, left: Iterator[tuple[Request, Matcher | None]]) -> None:
        for request, matcher in islice(left, self.scheduler.room_to_wait):
            self.add(request, matcher)

    @contextmanager
    def _whole_step(self) -> Iterator[None]:
        """The first Ctrl-C waits for the end; a second one ends the ranks, amid whatever they do."""
        with deferred_interrupts():
            try:
                yield
            except KeyboardInterrupt:
                self._executor.give_up()
                raise

    def settle(self) -> None:
        """Ends all requests and collects what is still in flight."""
        self.scheduler.abort_all()
        self._matchers.clear()
        if self._executor.is_broken or sys.is_finalizing():
            return
        while self.scheduler.num_in_flight:
            self._give_masks()
            with self._span(SpanKind.WAIT):
                output = self._executor.collect()
            self.scheduler.update(output)
        assert not self.scheduler.blocks.num_used, "cache blocks are held by no request"
        if self._spans is not None:
            self._spans.was_at_work()

    def _expired(self) -> list[RequestState]:
        return self.scheduler.take_expired(self.clock())

    def _event(self, news: News) -> TokenEvent:
        state = news.state
        if state.finish_reason is not None:
            self._matchers.pop(state.request.request_id, None)
        return TokenEvent(
            state.request.request_id,
            news.token_ids,
            state.finish_reason,
            state.stop_reason,
            self.clock(),
            news.logprobs,
            news.prompt_logprobs,
            state.num_cached,
            state.scheduled_s,
        )

    # --- structured output ---------------------------------------------------------------------

    def _matched(self, news: News) -> News:
        """Tells the request's matcher; it may end the request, and where it fails, that one alone."""
        if not self._matchers:
            return news
        state = news.state
        matcher = self._matchers.get(state.request.request_id)
        if matcher is None or not news.token_ids:
            return news
        try:
            matcher.accept(news.token_ids)
        except EngineError as error:
            self.scheduler.abort(state.request.request_id)
            state.finish_reason, state.stop_reason = "error", str(error)
            return News(state, [], [])
        if matcher.is_stopped and state.finish_reason is None:
            self.scheduler.abort(state.request.request_id, "stop")
        return news

    def _await_masks(self, batch: ScheduledBatch) -> None:
        waiting = [
            (piece.slot, self.scheduler.state_in(piece.slot), piece.start + piece.num_tokens)
            for piece in batch.pieces
            if piece.needs_mask
        ]
        if waiting:
            self._masked.append(_Masked(batch, waiting))

    def _give_masks(self) -> None:
        """To every step in flight, in order, all whose tokens so far are known."""
        while self._masked:
            masked = self._masked[0]
            if not all(
                state.finish_reason is not None or len(state.token_ids) >= num_tokens
                for _, state, num_tokens in masked.waiting
            ):
                return
            self._masked.popleft()
            slots = [slot for slot, _, _ in masked.waiting]
            masks = [self._mask(state) for _, state, _ in masked.waiting]
            self._executor.give_masks(StepMasks(*masked.batch.header, slots, masks))

    def _mask(self, state: RequestState) -> bytes:
        """Empty where the request has ended and nobody reads what is chosen."""
        matcher = self._matchers.get(state.request.request_id)
        return b"" if matcher is None else matcher.mask()
