"""The ledger of rings that are written while they are read."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from piped import US, Piped

from bireme.chrome_trace import Recorded
from bireme.observe.causes import Row
from bireme.observe.ledger import make_ledger
from bireme.observe.recorder import Asked, AskedRank, Recorder
from bireme.observe.told import ToldLedger
from bireme.trace import RankSpans, Span, SpanKind, SpanRing


def test_it_ends_where_the_last_whole_step_did() -> None:
    """Of a step that goes on its inner spans are there already, and mean nothing yet."""
    rank, engine = SpanRing.create(), SpanRing.create()
    start_ns = time.monotonic_ns()
    with engine.span(SpanKind.SUBMIT, step_id=1):
        pass
    with rank.span(SpanKind.STEP, step_id=1), rank.span(SpanKind.COMPUTE):
        until(start_ns + 5_000_000)
    ended_ns = rank.read()[-1].end_ns
    with rank.span(SpanKind.STEP, step_id=2):
        with rank.span(SpanKind.COMPUTE):
            until(time.monotonic_ns() + 5_000_000)
        asked = Asked([AskedRank("rank 0", 0, 0, os.dup(rank.fd))], os.dup(engine.fd), 1.0)
        asked_ns = time.monotonic_ns()
        told = Recorder().told(asked)
    (found,) = told.ranks
    assert told.until_s * 1e9 >= asked_ns - ended_ns
    assert found.shares[Row.UNATTRIBUTED] < 0.01
    assert found.shares[Row.COMPUTE] > 0.9


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 90),
    st.integers(1, 6),
    st.integers(0, 1),
    st.lists(st.integers(1, 500), min_size=7, max_size=7),
    st.integers(1, 40),
    st.integers(0, 20_000),
)
def test_of_the_last_steps_it_tells_what_a_ledger_of_everything_does(
    num_stages: int,
    num_steps: int,
    num_groups: int,
    lookahead: int,
    times: list[int],
    most_steps: int,
    hangs_us: int,
) -> None:
    """Of the same window: what it reads before that is enough to tell why a rank idled. Also where all hang
    in a step at the end."""
    piped = Piped(
        num_stages, num_steps, min(num_groups, num_stages),
        lambda stage, step: times[(stage * 3 + step) % 7] * US, 50 * US, 20 * US, lookahead,
        700 * US, frozenset({num_steps // 2} - {0}),
    ).run()  # fmt: skip
    done_ns = max(span.end_ns for span in piped.driver)
    hang = Span(SpanKind.WAIT, done_ns, done_ns + hangs_us * US, 0, num_steps, 0)
    engine_spans = moved([*piped.driver, hang])
    recorded = Recorded(
        [RankSpans(f"rank {at}", at, 0, moved(spans)) for at, spans in enumerate(piped.stages)],
        engine_spans,
    )
    with ExitStack() as stack:
        rings = [stack.enter_context(closing(ring_of(rank.spans))) for rank in recorded.ranks]
        engine = stack.enter_context(closing(ring_of(recorded.engine)))
        ranks = [
            AskedRank(rank.name, rank.stage, 0, ring.fd)
            for rank, ring in zip(recorded.ranks, rings, strict=True)
        ]
        asked = Asked(ranks, engine.fd, 10.0, is_running=False, most_steps=most_steps)
        for ring in rings if hangs_us else ():
            ring.begin(SpanKind.STEP)
        told = Recorder().told(asked)
    end_ns = engine_spans[-1].end_ns
    if hangs_us:
        end_ns = min(max(span.end_ns for span in rank.spans) for rank in recorded.ranks)
    submits = [span.start_ns for span in engine_spans if span.kind is SpanKind.SUBMIT]
    submits = [start_ns for start_ns in submits if start_ns < end_ns]
    start_ns = end_ns - round(told.seconds * 1e9)
    assert start_ns == (submits[-most_steps] if len(submits) > most_steps else recorded.start_ns)
    expected = ToldLedger.of(make_ledger(recorded, start_ns, end_ns))
    assert told.ranks == expected.ranks


def moved(spans: Sequence[Span]) -> list[Span]:
    """A second on: those of a `Piped` begin before 0, which no clock does."""
    return [
        msgspec.structs.replace(it, start_ns=it.start_ns + 10**9, end_ns=it.end_ns + 10**9)
        for it in spans
    ]


def ring_of(spans: Sequence[Span]) -> SpanRing:
    """As they are, in the order in which they ended."""
    ring = SpanRing.create(1 << 10)
    for span in sorted(spans, key=lambda it: it.end_ns):
        ring.record(span.kind, 0, span.start_ns, span.end_ns, 0, span.step_id, span.incarnation)
    return ring


def until(end_ns: int) -> None:
    while time.monotonic_ns() < end_ns:
        pass
