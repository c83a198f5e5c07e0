"""The bubble ledger: where each rank's time went, from the spans that it writes anyway.

Every row is measured by itself, and an instant counts once: work before collectives, before transfer,
before idleness, whose causes are told by `causes`. What the rows leave of the wall time is told too.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from bireme.chrome_trace import Recorded
from bireme.errors import UserError
from bireme.observe.causes import Causes, Row
from bireme.observe.timeline import (
    Driver,
    Key,
    RankStep,
    key_of,
    rank_steps,
    sender_index,
    tracks,
)
from bireme.trace import RankSpans, Span, SpanKind

_WORK = (Row.COMPUTE, Row.COLLECTIVE_WAIT, Row.COLLECTIVE_MOVE)


class Piece(NamedTuple):
    """[start_ns, end_ns) of one rank's time; `key` is the step that it was at, if any."""

    start_ns: int
    end_ns: int
    row: Row
    key: Key | None = None


@dataclass(frozen=True)
class RankLedger:
    """One rank's time in the window, in disjoint pieces; `late_ns` by whom it waited for in collectives.
    `overlapped_ns` of its sends went on beside later steps' work, and are in no row. `is_sampled`: most
    steps' collectives were not marked, and are taken to be as those that were."""

    name: str
    stage: int
    wall_ns: int
    pieces: Sequence[Piece]
    late_ns: Mapping[str, int]
    overlapped_ns: int
    is_sampled: bool

    @cached_property
    def ns(self) -> Mapping[Row, int]:
        """By row; they add up to the wall time."""
        found = dict.fromkeys(Row, 0)
        for piece in self.pieces:
            found[piece.row] += piece.end_ns - piece.start_ns
        found[Row.UNATTRIBUTED] = 0
        found[Row.UNATTRIBUTED] = self.wall_ns - sum(found.values())
        return found

    def share(self, row: Row) -> float:
        return self.ns[row] / self.wall_ns


@dataclass(frozen=True)
class Ledger:
    """All ranks over one window [start_ns, end_ns)."""

    start_ns: int
    end_ns: int
    ranks: Sequence[RankLedger]


def make_ledger(
    recorded: Recorded,
    start_ns: int | None = None,
    end_ns: int | None = None,
) -> Ledger:
    """Of the window [start_ns, end_ns), or from when the first step was told to the end of the last; the
    ranks' and the engine's spans are of one clock. UserError where there is neither."""
    ranks = recorded.ranks
    window = _window(recorded, start_ns, end_ns)
    steps = [rank_steps(rank.spans) for rank in ranks]
    stages = _stages(ranks, steps)
    told = Driver(recorded.engine)
    causes = Causes(tracks(stages, told), stages, told)
    arrivals = _arrivals(ranks, steps)
    found = [
        _RankPieces(rank, its, window, steps[sender_index(rank, ranks)], causes, arrivals)
        for rank, its in zip(ranks, steps, strict=True)
    ]
    return Ledger(*window, [one.ledger() for one in found])


def _window(recorded: Recorded, start_ns: int | None, end_ns: int | None) -> tuple[int, int]:
    submits = [it.start_ns for it in recorded.engine if it.kind is SpanKind.SUBMIT]
    told = min(submits, default=None)
    steps = [
        span
        for rank in recorded.ranks
        for span in rank.spans
        if span.kind is SpanKind.STEP and (told is None or span.start_ns >= told)
    ]
    if not steps and (start_ns is None or end_ns is None):
        raise UserError("there is no step to account for; run something first")
    first = min((span.start_ns for span in steps), default=0) if told is None else told
    start = first if start_ns is None else start_ns
    end = max(span.end_ns for span in steps) if end_ns is None else end_ns
    if start >= end:
        raise UserError("no time passed in the steps that were recorded; record a longer run")
    return start, end


def _stages(
    ranks: Sequence[RankSpans], steps: Sequence[Sequence[RankStep]]
) -> list[list[RankStep]]:
    """Each stage's steps, as the rank of its tensor group saw them that was last to hand over."""
    found: dict[int, dict[Key, RankStep]] = {rank.stage: {} for rank in ranks}
    for rank, its in zip(ranks, steps, strict=True):
        last = found[rank.stage]
        for step in its:
            if step.key not in last or last[step.key].sent_ns < step.sent_ns:
                last[step.key] = step
    return [
        sorted(found[stage].values(), key=lambda step: step.start_ns) for stage in sorted(found)
    ]


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


class _RankPieces:
    """Cuts one rank's time in the window, from its first nanosecond to the last."""

    def __init__(
        self,
        rank: RankSpans,
        steps: Sequence[RankStep],
        window: tuple[int, int],
        sender: Sequence[RankStep],
        causes: Causes,
        arrivals: Arrivals,
    ) -> None:
        self._rank, self._steps, (self._start, self._end) = rank, steps, window
        self._causes, self._arrivals = causes, arrivals
        self._sent = {step.key: step.sent_ns for step in sender}
        self._late: Counter[str] = Counter()
        self._sampled = self._collective_shares()

    def ledger(self) -> RankLedger:
        wall = self._end - self._start
        pieces = [piece for piece in map(self._clipped, self._all()) if piece is not None]
        overlapped_ns = _overlapped_ns(pieces, _beside(self._steps))
        if self._sampled is not None:
            self._late = _scaled(self._late, pieces)
        return RankLedger(
            self._rank.name, self._rank.stage, wall, pieces, self._late, overlapped_ns,
            self._sampled is not None,
        )  # fmt: skip

    def _collective_shares(self) -> dict[int, tuple[float, float]] | None:
        """Of the time of work, in waiting and in moving, by the steps whose collectives were marked and by how long
        these worked: one in which a device stood still says nothing of others. None where all were marked."""
        marked = [step for step in self._steps if step.collectives and step.busy_ns]
        if not marked or all(step.collectives for step in self._steps[1:]):
            return None  # of the first the ring may have lost some
        found: dict[int, list[int]] = {}
        for step in marked:
            of_length = found.setdefault(_length(step), [0, 0, 0])
            of_length[0] += step.busy_ns
            for ordinal, span in enumerate(step.collectives):
                come_ns, _ = self._come(step, ordinal, span)
                of_length[1] += come_ns - span.start_ns
                of_length[2] += span.end_ns - come_ns
        return {
            length: (wait_ns / busy_ns, move_ns / busy_ns)
            for length, (busy_ns, wait_ns, move_ns) in found.items()
        }

    def _clipped(self, piece: Piece) -> Piece | None:
        if self._start <= piece.start_ns < piece.end_ns <= self._end:
            return piece
        start, end = max(piece.start_ns, self._start), min(piece.end_ns, self._end)
        return Piece(start, end, piece.row, piece.key) if start < end else None

    def _all(self) -> Iterator[Piece]:
        at, last = self._start, None
        for step in self._steps:
            if step.end_ns > self._start and step.start_ns < self._end:
                yield from self._idle(at, step.start_ns, step.key)
                yield from self._step(step)
                at = step.end_ns
            last = step.key if step.start_ns < self._end else last
        yield from self._idle(at, self._end, self._causes.next_after(last))

    def _step(self, step: RankStep) -> Iterator[Piece]:
        """What lies inside work is cut out of it; what only overlaps it is not."""
        busy = [(span.start_ns, span.end_ns) for span in step.collectives]
        for ordinal, span in enumerate(step.collectives):
            yield from self._collective(step, ordinal, span)
        receives = [(span.start_ns, span.end_ns) for span in step.receives]
        sends = list(step.inner_sends)
        for span in step.work:
            inside = (
                it for it in (*receives, *sends)
                if span.start_ns <= it[0] and it[1] <= span.end_ns
            )  # fmt: skip
            rest = list(_without((span.start_ns, span.end_ns), sorted([*busy, *inside])))
            busy += rest
            for start, end in rest:
                yield from self._work(step, start, end)
        busy.sort()
        come = [piece for span in step.receives for piece in self._receive(step, span)]
        yield from _pieces_without(come, busy)
        busy = sorted([*busy, *receives])
        gone = [piece for sent in sends for piece in self._send(step, *sent)]
        yield from _pieces_without(gone, busy)
        # between its parts the process itself is at work; without any work its spans are gone
        row = Row.HOST if step.work else Row.UNATTRIBUTED
        for start, end in _without((step.start_ns, step.end_ns), sorted([*busy, *sends])):
            yield Piece(start, end, row, step.key)

    def _receive(self, step: RankStep, span: Span) -> Iterator[Piece]:
        """Idle until the sender sends. The first stage receives ids, of an earlier step."""
        key = step.key if self._rank.stage else key_of(span)
        sent_ns = self._sent.get(key, span.end_ns)
        begun_ns = min(max(span.start_ns, sent_ns), span.end_ns)
        yield from self._idle(span.start_ns, begun_ns, key, is_own=self._rank.stage > 0)
        yield Piece(begun_ns, span.end_ns, Row.TRANSFER, step.key)

    def _send(self, step: RankStep, start_ns: int, end_ns: int) -> Iterator[Piece]:
        """Idle while the link is full: until the next stage takes a message."""
        begun_ns = start_ns
        if (full := self._causes.in_slot(self._rank.stage, step.key)) is not None:
            key, free_ns = full
            begun_ns = min(max(start_ns, free_ns), end_ns)
            yield from self._idle(start_ns, begun_ns, key, is_own=False)
        yield Piece(begun_ns, end_ns, Row.TRANSFER, step.key)

    def _work(self, step: RankStep, start_ns: int, end_ns: int) -> Iterator[Piece]:
        """With its collectives, where these were not marked, at its end, as in steps about as long."""
        if self._sampled is None or step.collectives:
            yield Piece(start_ns, end_ns, Row.COMPUTE, step.key)
            return
        length = _length(step)
        wait, move = self._sampled[min(self._sampled, key=lambda it: abs(it - length))]
        num_ns = end_ns - start_ns
        wait_ns = start_ns + round(num_ns * (1 - wait - move))
        move_ns = start_ns + round(num_ns * (1 - move))
        yield Piece(start_ns, wait_ns, Row.COMPUTE, step.key)
        yield Piece(wait_ns, move_ns, Row.COLLECTIVE_WAIT, step.key)
        yield Piece(move_ns, end_ns, Row.COLLECTIVE_MOVE, step.key)

    def _come(self, step: RankStep, ordinal: int, span: Span) -> tuple[int, str]:
        """When all of the group had come to a collective, and who was last."""
        last_ns, name = self._arrivals[self._rank.stage, step.key, ordinal]
        return min(max(last_ns, span.start_ns), span.end_ns), name

    def _collective(self, step: RankStep, ordinal: int, span: Span) -> Iterator[Piece]:
        come_ns, name = self._come(step, ordinal, span)
        wait = self._clipped(Piece(span.start_ns, come_ns, Row.COLLECTIVE_WAIT, step.key))
        if wait is not None:
            self._late[name] += wait.end_ns - wait.start_ns
            yield wait
        yield Piece(come_ns, span.end_ns, Row.COLLECTIVE_MOVE, step.key)

    def _idle(
        self, start_ns: int, end_ns: int, awaited: Key | None, *, is_own: bool = True
    ) -> Iterator[Piece]:
        start, end = max(start_ns, self._start), min(end_ns, self._end)
        if start < end:
            for begin, stop, row in self._causes.pieces(start, end, awaited, is_own=is_own):
                yield Piece(begin, stop, row)


def _length(step: RankStep) -> int:
    """Of its work, in powers of two."""
    return step.busy_ns.bit_length()


def _scaled(late: Counter[str], pieces: Sequence[Piece]) -> Counter[str]:
    """What was waited for each rank in marked steps, as much of all that was waited."""
    waits = (it.end_ns - it.start_ns for it in pieces if it.row is Row.COLLECTIVE_WAIT)
    factor = sum(waits) / max(1, late.total())
    return Counter({name: round(ns * factor) for name, ns in late.items()})


def _beside(steps: Sequence[RankStep]) -> list[tuple[int, int]]:
    """What of sends lies behind their steps' ends, without overlap."""
    tails = sorted(
        (max(span.start_ns, step.end_ns), span.end_ns)
        for step in steps
        for span in step.sends
        if span.end_ns > step.end_ns
    )
    found: list[tuple[int, int]] = []
    for start, end in tails:
        at = max(start, found[-1][1]) if found else start
        if at < end:
            found.append((at, end))
    return found


def _overlapped_ns(pieces: Sequence[Piece], sends: Sequence[tuple[int, int]]) -> int:
    """Of sends, what lies in work."""
    found = 0
    for piece in pieces if sends else ():
        if piece.row in _WORK:
            first = bisect_right(sends, piece.start_ns, key=lambda send: send[1])
            last = bisect_left(sends, piece.end_ns, key=lambda send: send[0])
            for start, end in sends[first:last]:
                found += min(end, piece.end_ns) - max(start, piece.start_ns)
    return found


def _pieces_without(pieces: Sequence[Piece], holes: Sequence[tuple[int, int]]) -> Iterator[Piece]:
    """What sorted holes leave of pieces."""
    for piece in pieces:
        for start, end in _without((piece.start_ns, piece.end_ns), holes):
            yield piece._replace(start_ns=start, end_ns=end)


def _without(outer: tuple[int, int], holes: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What sorted holes leave of an interval."""
    at, end = outer
    for start, stop in holes:
        if stop > at and start < end:
            if at < start:
                yield at, start
            at = stop
    if at < end:
        yield at, end
