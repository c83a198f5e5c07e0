"""A rank's time since it was loaded, told from outside: every moment once, and nothing counts down."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bireme.engine.rank_stats import RankBytes, RankStats, RankWatch
from bireme.trace import SpanKind, SpanRing

MEMORY = RankBytes(weight_bytes=1, cache_bytes=2, step_bytes=3)


class Rank:
    """A rank on a clock of seconds, and who watches it."""

    def __init__(self) -> None:
        self.now_s, self.ring = 0, SpanRing.create()
        self.watch = RankWatch(1, 3, self.ring, MEMORY, os.getpid(), lambda: self.now_s * 10**9)

    def spend(self, seconds: int) -> None:
        self.now_s += seconds

    @contextmanager
    def span(self, kind: SpanKind, num_bytes: int = 0) -> Iterator[None]:
        outer, start_s = self.ring.begin(kind), self.now_s
        yield
        self.ring.close_span(kind, outer, start_s * 10**9, self.now_s * 10**9, num_bytes, 0)

    def step(self) -> None:
        """Overhead 1 s, receive 2, busy 4 + 16 + 32, collective 8 + 64, send 128."""
        with self.span(SpanKind.STEP):
            self.spend(1)
            with self.span(SpanKind.RECV, 10):
                self.spend(2)
            with self.span(SpanKind.COMPUTE):
                self.spend(4)
                with self.span(SpanKind.ALL_REDUCE, 100):
                    self.spend(8)
                self.spend(16)
            with self.span(SpanKind.SAMPLE):
                self.spend(32)
                with self.span(SpanKind.ALL_GATHER, 1000):
                    self.spend(64)
                with self.span(SpanKind.SEND, 10000):
                    self.spend(128)

    def stats(self) -> RankStats:
        return self.watch.stats()


def accounted_s(stats: RankStats) -> float:
    """All parts; a receive is in the idle one."""
    return stats.busy_s + stats.collective_s + stats.send_s + stats.overhead_s + stats.idle_s


def test_every_moment_is_in_one_part() -> None:
    rank = Rank()
    rank.step()
    rank.spend(256)
    rank.step()
    stats = rank.stats()
    assert (stats.busy_s, stats.collective_s, stats.send_s) == (104, 144, 256)
    assert (stats.overhead_s, stats.receive_s, stats.idle_s) == (2, 4, 260)
    assert accounted_s(stats) == rank.now_s
    assert (stats.collective_bytes, stats.sent_bytes, stats.received_bytes) == (2200, 20000, 20)
    assert (stats.stage, stats.rank, stats.num_steps_total, stats.memory) == (1, 3, 2, MEMORY)


def test_what_was_before_does_not_count() -> None:
    rank = Rank()
    rank.step()
    rank.watch = RankWatch(0, 0, rank.ring, MEMORY, os.getpid(), lambda: rank.now_s * 10**9)
    rank.spend(5)
    stats = rank.stats()
    assert (stats.num_steps_total, stats.busy_s, stats.sent_bytes, stats.idle_s) == (0, 0, 0, 5)


def test_idle_time_never_counts_down_when_a_long_step_ends() -> None:
    rank = Rank()
    with rank.span(SpanKind.STEP), rank.span(SpanKind.COMPUTE):
        rank.spend(100)
        amid = rank.stats()
    assert (amid.idle_s, amid.busy_s) == (100, 0)
    after = rank.stats()
    assert (after.idle_s, after.busy_s) == (100, 100)
    rank.spend(150)
    assert accounted_s(rank.stats()) == pytest.approx(rank.now_s)
