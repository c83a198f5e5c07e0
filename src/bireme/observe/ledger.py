"""The bubble ledger: where each rank's time went, from the spans that it writes anyway.

Every row is measured by itself, and an instant counts once: work before collectives, before transfer,
before idleness, whose causes are told by `causes`. What the rows leave of the wall time is told too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from bireme.observe.causes import Cause, Causes
from bireme.observe.timeline import Driver, Key, RankSpans, RankStep, key_of, rank_steps, tracks
from bireme.trace import Span


@dataclass
class Rows:
    """One rank's nanoseconds. `collective_wait` is for the last of a tensor group to arrive, by whom in
    `late`; `host` includes what a rank itself needs around the work of a step."""

    name: str
    stage: int
    wall: int
    compute: int = 0
    collective_move: int = 0
    collective_wait: int = 0
    transfer: int = 0
    idle: Counter[Cause] = field(default_factory=Counter)
    late: Counter[str] = field(default_factory=Counter)

    @property
    def unattributed(self) -> int:
        """Of which no span tells, or which two rows would claim."""
        known = self.compute + self.collective_move + self.collective_wait + self.transfer
        return self.wall - known - sum(self.idle.values())


@dataclass(frozen=True)
class Ledger:
    """All ranks over one window [start_ns, end_ns)."""

    start_ns: int
    end_ns: int
    ranks: Sequence[Rows]


def make_ledger(
    ranks: Sequence[RankSpans],
    driver: Iterable[Span],
    *,
    start_ns: int,
    end_ns: int,
    has_token_dependency: bool = True,
) -> Ledger:
    """Of the window [start_ns, end_ns); the ranks' and the driver's spans are of one clock."""
    steps = [rank_steps(rank.spans) for rank in ranks]
    stages = [its for rank, its in zip(ranks, steps, strict=True) if rank.tp_rank == 0]
    told = Driver(list(driver))
    causes = Causes(tracks(stages, told), stages, told, has_token_dependency=has_token_dependency)
    senders = [None, *({step.key: step for step in its} for its in stages)]
    arrivals = _arrivals(ranks, steps)
    window = start_ns, end_ns
    return Ledger(
        start_ns,
        end_ns,
        [
            _RankLedger(
                rank, window, senders[rank.stage], rank.stage == len(stages) - 1, causes, arrivals
            ).rows(its)
            for rank, its in zip(ranks, steps, strict=True)
        ],
    )


Arrivals = Mapping[tuple[int, Key, int], tuple[int, str]]  # (stage, step, ordinal) -> last, by whom


def _arrivals(ranks: Sequence[RankSpans], steps: Sequence[Sequence[RankStep]]) -> Arrivals:
    """When the last rank of a tensor group came to each collective."""
    found: dict[tuple[int, Key, int], tuple[int, str]] = {}
    for rank, its in zip(ranks, steps, strict=True):
        for step in its:
            for ordinal, span in enumerate(step.collectives):
                at = rank.stage, step.key, ordinal
                found[at] = max(found.get(at, (0, "")), (span.start_ns, rank.name))
    return found


class _RankLedger:
    """One rank's time in the window, from its first nanosecond to the last."""

    def __init__(
        self,
        rank: RankSpans,
        window: tuple[int, int],
        senders: Mapping[Key, RankStep] | None,
        is_last: bool,
        causes: Causes,
        arrivals: Arrivals,
    ) -> None:
        self._rank, (self._start, self._end) = rank, window
        self._senders, self._is_last = senders, is_last
        self._causes, self._arrivals = causes, arrivals
        self._rows = Rows(rank.name, rank.stage, self._end - self._start)

    def rows(self, steps: Sequence[RankStep]) -> Rows:
        at = self._start
        for step in steps:
            if step.end_ns > self._start and step.start_ns < self._end:
                self._idle(at, step.start_ns, step.key)
                self._step(step)
                at = step.end_ns
        last = max((it.key for it in steps if it.start_ns < self._end), default=None)
        self._idle(at, self._end, self._causes.next_after(last))
        return self._rows

    def _step(self, step: RankStep) -> None:
        for span in step.receives:
            self._receive(step, span)
        for ordinal, span in enumerate(step.collectives):
            self._collective(step, ordinal, span)
        inner = [*step.receives, *step.collectives, *step.sends]
        inside = self._sum(span for span in inner if _is_in(span, step.work))
        work = self._sum(step.work)
        around = self._length(step.start_ns, step.end_ns) - work - self._sum(inner) + inside
        for span in step.sends:
            self._send(step, span)
        self._rows.compute += work - inside
        self._rows.idle[Cause.HOST] += around

    def _receive(self, step: RankStep, span: Span) -> None:
        """Idle until the sender sends."""
        awaited, sent_ns = self._sender(step, span)
        begun_ns = span.end_ns if sent_ns is None else min(max(span.start_ns, sent_ns), span.end_ns)
        self._idle(span.start_ns, begun_ns, awaited, is_own=self._senders is not None)
        self._rows.transfer += self._length(begun_ns, span.end_ns)

    def _send(self, step: RankStep, span: Span) -> None:
        """Idle while the link is full: the next stage is behind."""
        free_ns = None if self._is_last else self._causes.slot_free_ns(self._rank.stage, step.key)
        begun_ns = (
            span.start_ns if free_ns is None else min(max(span.start_ns, free_ns), span.end_ns)
        )
        self._rows.idle[Cause.IMBALANCE] += self._length(span.start_ns, begun_ns)
        self._rows.transfer += self._length(begun_ns, span.end_ns)

    def _sender(self, step: RankStep, span: Span) -> tuple[Key | None, int | None]:
        """The step that is received, and when it was sent; the first stage receives ids."""
        if self._senders is None:
            key = key_of(span)
            return key, self._causes.ids_sent_ns(key)
        sender = self._senders.get(step.key)
        return step.key, None if sender is None else sender.sent_ns

    def _collective(self, step: RankStep, ordinal: int, span: Span) -> None:
        last_ns, name = self._arrivals[self._rank.stage, step.key, ordinal]
        come_ns = min(max(last_ns, span.start_ns), span.end_ns)
        wait = self._length(span.start_ns, come_ns)
        self._rows.collective_wait += wait
        if wait:
            self._rows.late[name] += wait
        self._rows.collective_move += self._length(come_ns, span.end_ns)

    def _idle(
        self, start_ns: int, end_ns: int, awaited: Key | None, *, is_own: bool = True
    ) -> None:
        start, end = max(start_ns, self._start), min(end_ns, self._end)
        if start >= end:
            return
        for begin, stop, cause in self._causes.pieces(start, end, awaited, is_own=is_own):
            if cause is Cause.TRANSFER:
                self._rows.transfer += stop - begin
            elif cause is not Cause.UNATTRIBUTED:
                self._rows.idle[cause] += stop - begin

    def _sum(self, spans: Iterable[Span]) -> int:
        return sum(self._length(span.start_ns, span.end_ns) for span in spans)

    def _length(self, start_ns: int, end_ns: int) -> int:
        """Of the part that lies in the window."""
        return max(0, min(end_ns, self._end) - max(start_ns, self._start))


def _is_in(span: Span, outer: Sequence[Span]) -> bool:
    return any(it.start_ns <= span.start_ns and span.end_ns <= it.end_ns for it in outer)
