"""Span rings: what is written can be read, by others too, and the oldest make room."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from bireme.trace import Now, Span, SpanKind, SpanRing, Total


def test_spans_come_back_in_order() -> None:
    ring = SpanRing.create(8)
    ring.set_step(7, 1)
    ring.write(SpanKind.COMPUTE, 10, 20)
    ring.write(SpanKind.ALL_REDUCE, 20, 25, num_bytes=4096)
    assert ring.read() == [
        Span(SpanKind.COMPUTE, 10, 20, 0, 7, 1),
        Span(SpanKind.ALL_REDUCE, 20, 25, 4096, 7, 1),
    ]
    ring.close()


@given(st.integers(1, 9), st.integers(0, 40))
def test_a_full_ring_keeps_the_newest(capacity: int, count: int) -> None:
    ring = SpanRing.create(capacity)
    for index in range(count):
        ring.write(SpanKind.STEP, index, index + 1)
    starts = [span.start_ns for span in ring.read()]
    assert starts == list(range(count))[-len(starts) :] if starts else count == 0 or capacity == 1
    assert len(starts) >= min(count, capacity - 1)
    ring.close()


def test_what_a_writer_came_over_meanwhile_is_left_out() -> None:
    """Whatever is read of a full ring that another process fills is whole, and in order."""
    ring = SpanRing.create(1 << 6)
    code = (
        "import sys; from itertools import count; from bireme.trace import SpanKind, SpanRing\n"
        "ring = SpanRing(int(sys.argv[1]))\n"
        "for at in count(): ring.write(SpanKind.STEP, at, at + 1)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(ring.fd)], pass_fds=[ring.fd]) as writer:
        try:
            reads = 0
            while reads < 2000:
                starts = [span.start_ns for span in ring.read()]
                if starts and starts[0]:  # it has gone round
                    assert starts == list(range(starts[0], starts[0] + len(starts)))
                    reads += 1
        finally:
            writer.kill()
    ring.close()


def test_spans_outlive_a_killed_writer() -> None:
    ring = SpanRing.create()
    code = (
        "import os, signal, sys; from bireme.trace import SpanKind, SpanRing;"
        "ring = SpanRing(int(sys.argv[1])); ring.write(SpanKind.COMPUTE, 1, 2, 3);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ring.fd)], pass_fds=[ring.fd], check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert ring.read() == [Span(SpanKind.COMPUTE, 1, 2, 3, 0, 0)]
    ring.close()


def test_a_ring_leaves_no_file_behind() -> None:
    before = set(os.listdir("/dev/shm"))
    ring = SpanRing.create()
    assert set(os.listdir("/dev/shm")) == before
    ring.close()


def test_what_a_writer_is_in_the_middle_of_is_seen_from_outside() -> None:
    ring = SpanRing.create()
    code = (
        "import os, signal, sys; from bireme.trace import SpanKind, SpanRing\n"
        "ring = SpanRing(int(sys.argv[1])); ring.set_step(7, 0)\n"
        "with ring.span(SpanKind.STEP):\n"
        "    with ring.span(SpanKind.COMPUTE):\n"
        "        with ring.span(SpanKind.ALL_REDUCE): pass\n"
        "        os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert ring.now() == Now(0, 0, None)
    subprocess.run([sys.executable, "-c", code, str(ring.fd)], pass_fds=[ring.fd], check=False)
    assert ring.now() == Now(7, 3, SpanKind.COMPUTE)
    ring.close()


def test_a_new_step_has_begun_nothing() -> None:
    ring = SpanRing.create()
    with ring.span(SpanKind.STEP), ring.span(SpanKind.SEND):
        assert ring.now().is_waiting
    assert ring.now() == Now(0, 2, None)
    ring.set_step(1, 0)
    assert ring.now() == Now(1, 0, None)
    ring.close()


def test_totals_tell_a_span_from_those_inside_it() -> None:
    ring = SpanRing.create(2)
    with ring.span(SpanKind.STEP):
        with ring.span(SpanKind.COMPUTE):
            for _ in range(5):
                ring.write(SpanKind.ALL_REDUCE, 10, 17, num_bytes=100)
        assert ring.totals()[SpanKind.ALL_REDUCE] == Total()  # the step has not ended
    totals = ring.totals()
    assert totals[SpanKind.ALL_REDUCE] == Total(5, 35, 0, 500)
    compute, step = totals[SpanKind.COMPUTE], totals[SpanKind.STEP]
    assert (compute.num_spans, compute.inner_ns, step.inner_ns) == (1, 35, compute.ns)
    assert step.own_ns + compute.own_ns + 35 == step.ns
    ring.close()


@given(st.lists(st.tuples(st.sampled_from(SpanKind), st.integers(0, 99), st.integers(0, 99))))
def test_totals_know_what_the_ring_forgot(records: list[tuple[SpanKind, int, int]]) -> None:
    ring = SpanRing.create(3)
    for kind, num_ns, num_bytes in records:
        ring.write(kind, 7, 7 + num_ns, num_bytes)
    for kind, total in ring.totals().items():
        mine = [record for record in records if record[0] is kind]
        sums = sum(record[1] for record in mine), sum(record[2] for record in mine)
        assert total == Total(len(mine), sums[0], 0, sums[1])
    ring.close()


def test_totals_of_a_time_between_are_a_difference() -> None:
    ring = SpanRing.create()
    ring.write(SpanKind.SEND, 1, 3, 8)
    before = ring.totals()[SpanKind.SEND]
    ring.write(SpanKind.SEND, 3, 9, 4)
    assert ring.totals()[SpanKind.SEND] - before == Total(1, 6, 0, 4)
    ring.close()
