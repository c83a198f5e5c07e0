"""What a rank did with its time since it was loaded, from the totals of its span ring: plain Python.

Every moment is in one part only, and the parts add up to the time since then, to within the step that
is running (its parts are known at its end; until then it counts as idle):

    |-- idle: no step --|------------------------- a step --------------------------|
                        | overhead | idle: receive | busy | collective | busy | send |
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from bireme.engine.process_stat import major_faults
from bireme.trace import COLLECTIVES, SpanKind, SpanRing, Total


class RankBytes(msgspec.Struct, frozen=True):
    """What a rank holds; `step_bytes` is what the largest step may take beside the others, as planned."""

    weight_bytes: int
    cache_bytes: int
    step_bytes: int


class RankStats(msgspec.Struct, frozen=True):
    """One rank, since it was loaded. `collective_s` holds the wait for the others of its tensor group,
    `receive_s` the wait for another stage, and is part of `idle_s`; `busy_s` is the layers and the
    choice of tokens without them, and with the wait for a grammar's mask."""

    stage: int
    rank: int
    num_steps_total: int
    busy_s: float
    collective_s: float
    send_s: float
    receive_s: float
    overhead_s: float  # the rest of a step: its inputs and tables
    idle_s: float
    collective_bytes: int
    sent_bytes: int
    received_bytes: int
    major_faults_total: int  # pages that were read from disk
    memory: RankBytes


class RankWatch:
    """Reads a rank's ring from outside, from the moment on in which this is made."""

    def __init__(
        self,
        stage: int,
        rank: int,
        ring: SpanRing,
        memory: RankBytes,
        pid: int,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._stage, self._rank, self._ring, self._memory = stage, rank, ring, memory
        self._clock_ns, self._begun_ns = clock_ns, clock_ns()
        self._before = ring.totals()
        self._idle_ns = 0
        self._pid = pid
        self._faults_before = self._faults = major_faults(pid) or 0

    def stats(self) -> RankStats:
        elapsed_ns = self._clock_ns() - self._begun_ns
        found = self._ring.totals()
        since = {kind: total - self._before[kind] for kind, total in found.items()}
        step, send, receive = (
            since[kind] for kind in (SpanKind.STEP, SpanKind.SEND, SpanKind.RECV)
        )
        collective = [since[kind] for kind in COLLECTIVES]
        # a running step's end takes it off again, and what counts up must not go down
        self._idle_ns = max(self._idle_ns, elapsed_ns - step.ns + receive.ns)
        return RankStats(
            stage=self._stage,
            rank=self._rank,
            num_steps_total=step.num_spans,
            busy_s=_seconds(since[SpanKind.COMPUTE], since[SpanKind.SAMPLE]),
            collective_s=_seconds(*collective),
            send_s=_seconds(send),
            receive_s=_seconds(receive),
            overhead_s=_seconds(step),
            idle_s=self._idle_ns / 1e9,
            collective_bytes=sum(total.num_bytes for total in collective),
            sent_bytes=send.num_bytes,
            received_bytes=receive.num_bytes,
            major_faults_total=self._major_faults() - self._faults_before,
            memory=self._memory,
        )

    def _major_faults(self) -> int:
        """As last seen, of a process that is gone."""
        self._faults = major_faults(self._pid) or self._faults
        return self._faults


def _seconds(*totals: Total) -> float:
    return sum(total.own_ns for total in totals) / 1e9
