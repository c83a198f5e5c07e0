"""Spans of a pipeline that was never there: every time in them is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from bireme.chrome_trace import Recorded
from bireme.observe.ledger import Ledger, make_ledger
from bireme.trace import RankSpans, Span, SpanKind

US = 1000  # nanoseconds


@dataclass
class Piped:
    """`num_groups` requests take turns through the stages; a step needs the ids of its group's last.

    `lookahead` steps are told to the ranks beside one a group, before their ids are known. Nanoseconds:
    `work_ns(stage, step)`, `link_ns` between ranks, `host_ns` before each submission, and `empty_ns`,
    in which there is no request, before the steps in `after_empty`. A narrow link carries one message
    at a time.
    """

    num_stages: int
    num_steps: int
    num_groups: int
    work_ns: Callable[[int, int], int] = lambda stage, step: 100 * US
    link_ns: int = 0
    host_ns: int = 0
    lookahead: int = 1
    empty_ns: int = 0
    after_empty: frozenset[int] = frozenset()
    is_narrow: bool = False
    driver: list[Span] = field(default_factory=list)
    stages: list[list[Span]] = field(default_factory=list)

    def run(self) -> Piped:
        self.driver, self.stages = [], [[] for _ in range(self.num_stages)]
        self._end = [0] * self.num_stages
        self._link_free = [0] * self.num_stages
        self._begun: list[list[int]] = [[] for _ in range(self.num_stages)]
        self._sampled: list[int] = []  # when each step's ids were sent
        self._now = 0  # the driver's
        self._tell(self.driver, SpanKind.EMPTY, -US, 0, 0)
        for step in range(self.num_steps):
            self._pass(step, self._submit(step))
        self._tell(self.driver, SpanKind.WAIT, self._now, self._end[-1], step)
        return self

    def ledger(self) -> Ledger:
        """Of all of it."""
        return make_ledger(self.recorded, 0, max(self._end))

    @property
    def recorded(self) -> Recorded:
        ranks = [RankSpans(f"rank {it}", it, 0, spans) for it, spans in enumerate(self.stages)]
        return Recorded(ranks, self.driver)

    def _tell(self, spans: list[Span], kind: SpanKind, start: int, end: int, step: int) -> None:
        if start < end:
            spans.append(Span(kind, start, end, 0, step, 0))

    def _submit(self, step: int) -> int:
        """When all ranks know of it."""
        if step in self.after_empty:
            done = max(self._sampled)
            self._tell(self.driver, SpanKind.WAIT, self._now, done, step)
            self._tell(self.driver, SpanKind.EMPTY, done, done + self.empty_ns, step)
            self._now = done + self.empty_ns
        before = step - self.num_groups - self.lookahead
        if before >= 0 and self._now < self._sampled[before]:
            self._tell(self.driver, SpanKind.WAIT, self._now, self._sampled[before], step)
            self._now = self._sampled[before]
        self._tell(self.driver, SpanKind.WORK, self._now, self._now + self.host_ns, step)
        self._now += self.host_ns
        self._tell(self.driver, SpanKind.SUBMIT, self._now, self._now + US, step)
        self._now += US
        return self._now

    def _pass(self, step: int, told: int) -> None:
        """Through all stages."""
        needed = step - self.num_groups
        is_alone = any(needed < it <= step for it in self.after_empty)
        come = 0 if needed < 0 or is_alone else self._sampled[needed] + self.link_ns
        for stage, spans in enumerate(self.stages):
            start = max(told, self._end[stage])
            begun = max(start, come)
            if come:
                of = step if stage else needed
                spans.append(Span(SpanKind.RECV, start, begun, 0, of, 0))  # perhaps it was there
            self._begun[stage].append(begun)
            end = begun + self.work_ns(stage, step)
            self._tell(spans, SpanKind.COMPUTE, begun, end, step)
            sent = max(end, self._slot_free(stage, step)) + US
            self._tell(spans, SpanKind.SEND, end, sent, step)
            self._tell(spans, SpanKind.STEP, start, sent, step)
            self._end[stage] = sent
            come = max(sent - US, self._link_free[stage]) + self.link_ns
            self._link_free[stage] = come * self.is_narrow
        self._sampled.append(end)

    def _slot_free(self, stage: int, step: int) -> int:
        """When the link to the next stage, of one place more than stages, has a place."""
        before = step - self.num_stages - 1
        is_bounded = stage + 1 < self.num_stages and before >= 0
        return self._begun[stage + 1][before] if is_bounded else 0
