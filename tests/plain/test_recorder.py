"""The ledger of rings that are written while they are read."""

from __future__ import annotations

import os
import time

from bireme.observe.causes import Row
from bireme.observe.recorder import Asked, AskedRank, Recorder
from bireme.trace import SpanKind, SpanRing


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


def until(end_ns: int) -> None:
    while time.monotonic_ns() < end_ns:
        pass
