"""Spans as what they tell of steps: where each step was at what time, and what the driver was at.

Plain data, in nanoseconds of one clock. A step's way through a pipeline of two stages:

    driver   |submit|
    stage 0         |work|send|
    stage 1      |...receive..|work|
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from bireme.trace import COLLECTIVES, RankSpans, Span, SpanKind

Key = tuple[int, int]  # incarnation, step_id


@dataclass(slots=True)
class RankStep:
    """One step on one rank; the parts inside it in the order of their starts."""

    key: Key
    start_ns: int
    end_ns: int
    receives: list[Span] = field(default_factory=list)
    sends: list[Span] = field(default_factory=list)
    collectives: list[Span] = field(default_factory=list)
    work: list[Span] = field(default_factory=list)

    @property
    def work_ns(self) -> int:
        """When all that it waits for had come."""
        return self.receives[-1].end_ns if self.receives else self.start_ns

    @property
    def busy_ns(self) -> int:
        """How long its work took."""
        return sum(span.end_ns - span.start_ns for span in self.work)

    @property
    def inner_sends(self) -> Iterator[tuple[int, int]]:
        """What of its sends lies in it, without overlap."""
        at = self.start_ns
        for span in self.sends:
            start, end = max(span.start_ns, at), min(span.end_ns, self.end_ns)
            if start < end:
                yield start, end
                at = end

    @property
    def sent_ns(self) -> int:
        """When what others wait for was on its way."""
        return self.sends[0].start_ns if self.sends else self.end_ns


def rank_steps(spans: Iterable[Span]) -> list[RankStep]:
    """Whole steps, in their order. What lies in a step is of it; a receive may be of another's ids. A send
    may outlast its step, or begin after it."""
    in_order = sorted(spans, key=lambda span: (span.start_ns, span.kind, -span.end_ns))
    found: list[RankStep] = []
    last: dict[Key, RankStep] = {}
    for span in in_order:
        if span.kind is SpanKind.STEP:
            last[key_of(span)] = RankStep(key_of(span), span.start_ns, span.end_ns)
            found.append(last[key_of(span)])
        elif span.kind is SpanKind.SEND:
            if key_of(span) in last:
                last[key_of(span)].sends.append(span)
        elif found and span.end_ns <= found[-1].end_ns:
            _list_of(found[-1], span.kind).append(span)
    return found


def key_of(span: Span) -> Key:
    return span.incarnation, span.step_id


def _list_of(step: RankStep, kind: SpanKind) -> list[Span]:
    if kind is SpanKind.RECV:
        return step.receives
    if kind in COLLECTIVES:
        return step.collectives
    return step.work if kind in (SpanKind.COMPUTE, SpanKind.SAMPLE) else []


def sender_index(rank: RankSpans, ranks: Sequence[RankSpans]) -> int:
    """Which rank sends to this one: one of the stage before, or of the last one its ids, which the first
    stage receives. Of stages of unequal width receiver j takes from sender j * tp_src // tp_dst."""
    widths = Counter(other.stage for other in ranks)
    stage = (rank.stage - 1) % len(widths)
    place = stage, rank.tp_rank * widths[stage] // widths[rank.stage]
    return next(i for i, other in enumerate(ranks) if (other.stage, other.tp_rank) == place)


class StageSteps:
    """What step a stage was at."""

    def __init__(self, steps: Sequence[RankStep]) -> None:
        self._steps = steps
        self._starts = [step.start_ns for step in steps]

    def at(self, time_ns: int) -> RankStep | None:
        """That it had begun and not ended; it may wait for what the step needs."""
        index = bisect_right(self._starts, time_ns) - 1
        if index < 0 or time_ns >= self._steps[index].end_ns:
            return None
        return self._steps[index]


class Driver:
    """What the engine's process was at: it waits for a step, it has no request, or it works."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.submitted = {key_of(span): span for span in spans if span.kind is SpanKind.SUBMIT}
        self._waits = _Intervals(span for span in spans if span.kind is SpanKind.WAIT)
        self._empty = _Intervals(span for span in spans if span.kind is SpanKind.EMPTY)
        self._works = _Intervals(
            span for span in spans if span.kind in (SpanKind.WORK, SpanKind.SUBMIT)
        )
        self.changes_ns = sorted({time for span in spans for time in (span.start_ns, span.end_ns)})

    def works(self, time_ns: int) -> bool:
        return self._works.holds(time_ns)

    def waits(self, time_ns: int) -> bool:
        return self._waits.holds(time_ns)

    def is_empty(self, time_ns: int) -> bool:
        return self._empty.holds(time_ns)

    def next_empty_ns(self, time_ns: int) -> int | None:
        """When it next has no request."""
        return self._empty.next_start(time_ns)

    def last_empty_ns(self, time_ns: int) -> int | None:
        """When it last began to have none, before a time."""
        return self._empty.last_start(time_ns)


class _Intervals:
    """Intervals that do not overlap."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self._pairs = sorted((span.start_ns, span.end_ns) for span in spans)
        self._starts = [start for start, _ in self._pairs]

    def holds(self, time_ns: int) -> bool:
        index = bisect_right(self._starts, time_ns) - 1
        return index >= 0 and time_ns < self._pairs[index][1]

    def next_start(self, time_ns: int) -> int | None:
        index = bisect_left(self._starts, time_ns)
        return self._starts[index] if index < len(self._starts) else None

    def last_start(self, time_ns: int) -> int | None:
        index = bisect_right(self._starts, time_ns) - 1
        return self._starts[index] if index >= 0 else None


@dataclass(frozen=True, slots=True)
class Track:
    """One step's way through the stages; None where a stage's spans are gone."""

    key: Key
    submit_ns: int
    parts: tuple[RankStep | None, ...]
    is_first: bool  # since the driver last had no request

    @property
    def done_ns(self) -> int | None:
        last = self.parts[-1]
        return None if last is None else last.end_ns

    @property
    def needs(self) -> Key | None:
        """The step whose ids it begins with, as far as the first stage had to take them from a message."""
        first = self.parts[0]
        if len(self.parts) == 1 or first is None or not first.receives:
            return None
        return key_of(first.receives[-1])


def tracks(stages: Sequence[Sequence[RankStep]], driver: Driver) -> dict[Key, Track]:
    """By step, in the order of submission; of one rank a stage."""
    by_stage: list[Mapping[Key, RankStep]] = [{step.key: step for step in it} for it in stages]
    found: dict[Key, Track] = {}
    last_ns = None
    for key, span in sorted(driver.submitted.items(), key=lambda item: item[1].start_ns):
        empty_ns = driver.last_empty_ns(span.start_ns)
        is_first = last_ns is None or (empty_ns is not None and empty_ns >= last_ns)
        parts = tuple(of_stage.get(key) for of_stage in by_stage)
        found[key] = Track(key, _told_ns(span, parts), parts, is_first)
        last_ns = span.start_ns
    return found


def _told_ns(submit: Span, parts: Iterable[RankStep | None]) -> int:
    """From when on ranks know of a step: they may begin it before the driver is back from telling them."""
    begun = (part.start_ns for part in parts if part is not None)
    return max(submit.start_ns, min((submit.end_ns, *begun)))
