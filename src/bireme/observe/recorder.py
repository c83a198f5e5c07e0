"""The ledger of running ranks, made in a process of its own, so that it holds up no request:
`python -m bireme.observe.recorder` takes an `Asked` a line in JSON, and answers with a `ToldLedger`."""

from __future__ import annotations

import gc
import os
import sys
import time
from bisect import bisect_left
from collections.abc import Sequence

import msgspec

from bireme.chrome_trace import Recorded
from bireme.observe.gantt import Gantt
from bireme.observe.ledger import make_ledger
from bireme.observe.told import NUM_COLUMNS, ToldLedger
from bireme.trace import RankSpans, Span, SpanKind, SpanRing

_BEFORE_NS = 200_000_000  # what steps at the beginning of the window waited for was earlier


class AskedRank(msgspec.Struct, frozen=True):
    """A rank and the descriptor of its ring."""

    name: str
    stage: int
    tp_rank: int
    fd: int


class Asked(msgspec.Struct, frozen=True):
    """Of the last `seconds`, or of the last `most_steps` where there were more; `engine_fd` is the ring of
    the engine itself. Where it runs no more, they are the last before its last span ended. `gantt_steps`:
    the last of them as bars, `gantt_bars` of all ranks."""

    ranks: list[AskedRank]
    engine_fd: int
    seconds: float
    num_columns: int = NUM_COLUMNS
    is_running: bool = True
    most_steps: int | None = None
    gantt_steps: int = 0
    gantt_bars: int = 0


class Recorder:
    """Rings are mapped once, however often they are read."""

    def __init__(self) -> None:
        self._rings: dict[int, SpanRing] = {}

    def told(self, asked: Asked) -> ToldLedger:
        """Up to the last moment of which all ranks' spans tell: a step's come when it has ended."""
        now_ns = time.monotonic_ns()
        engine, rings = self._ring(asked.engine_fd), [self._ring(rank.fd) for rank in asked.ranks]
        last_ns = now_ns if asked.is_running else _last_ns(engine, now_ns)
        end_ns = min((_known_ns(ring, last_ns) for ring in rings), default=last_ns)
        length_ns, before_ns = _lengths(asked, engine, end_ns)
        since_ns = end_ns - length_ns
        found = [ring.read(since_ns - before_ns) for ring in rings]
        told = engine.read(since_ns - before_ns)
        if asked.is_running:
            told = _with_open(engine, told, now_ns)
        recorded = Recorded(
            [
                RankSpans(rank.name, rank.stage, rank.tp_rank, spans)
                for rank, spans in zip(asked.ranks, found, strict=True)
            ],
            told,
        )
        start_ns = max(since_ns, min((span.start_ns for span in told), default=0))
        for ring, spans in zip(rings, found, strict=True):
            start_ns = max(start_ns, _first_ns(ring, spans))
        ledger = make_ledger(recorded, min(start_ns, end_ns - 1), end_ns)
        gantt = None
        if asked.gantt_steps:
            gantt = Gantt.of(ledger, asked.gantt_bars, asked.gantt_steps)
        return ToldLedger.of(ledger, (now_ns - end_ns) / 1e9, asked.num_columns, gantt)

    def _ring(self, fd: int) -> SpanRing:
        if fd not in self._rings:
            self._rings[fd] = SpanRing(fd)
        return self._rings[fd]


def _known_ns(ring: SpanRing, last_ns: int) -> int:
    """Until when all of a rank is told: the spans in a step that goes on mean nothing yet."""
    if ring.now().kind is None:
        return last_ns
    step_ns = ring.last_end_ns(SpanKind.STEP)
    return last_ns if step_ns is None else min(last_ns, step_ns)


def _lengths(asked: Asked, engine: SpanRing, end_ns: int) -> tuple[int, int]:
    """Of the window, and of what is read before it: what the steps in it wait for are others in flight, of
    which there are at most one more than stages, and what those wait for."""
    length_ns = round(asked.seconds * 1e9)
    told = engine.read(end_ns - length_ns - _BEFORE_NS)
    submits = [it.start_ns for it in told if it.kind is SpanKind.SUBMIT and it.start_ns < end_ns]
    if asked.most_steps is not None and len(submits) > asked.most_steps:
        length_ns = min(length_ns, end_ns - submits[-asked.most_steps])
    num_stages = max(rank.stage for rank in asked.ranks) + 1
    before = bisect_left(submits, end_ns - length_ns) - 2 * (num_stages + 1)
    if before < 0:
        return length_ns, _BEFORE_NS
    return length_ns, min(_BEFORE_NS, end_ns - length_ns - submits[before])


def _first_ns(ring: SpanRing, spans: Sequence[Span]) -> int:
    """From when on a ring knows all: it may have been overwritten."""
    is_full = len(spans) >= ring.capacity - 1
    return spans[0].end_ns if is_full else 0


def _last_ns(ring: SpanRing, now_ns: int) -> int:
    """When the last span ended; now where there is none."""
    return max((span.end_ns for span in ring.read(now_ns)), default=now_ns)


def _with_open(ring: SpanRing, spans: list[Span], now_ns: int) -> list[Span]:
    """And with what the engine is in the middle of, which it began when the last span ended or later."""
    kind = ring.now().kind
    if kind not in (SpanKind.WAIT, SpanKind.EMPTY):
        kind = SpanKind.WORK
    start_ns = max((span.end_ns for span in spans), default=0)
    return [*spans, Span(kind, start_ns, now_ns, 0, 0, 0)]


def main() -> None:
    os.nice(10)  # the ranks go first
    gc.disable()  # nothing here refers to itself, and looking for that takes a quarter of the time
    recorder = Recorder()
    for line in sys.stdin.buffer:
        asked = msgspec.json.decode(line, type=Asked)
        sys.stdout.buffer.write(recorder.told(asked).as_json() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
