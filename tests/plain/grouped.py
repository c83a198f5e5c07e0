"""Spans of tensor groups that were never there: when each rank came to each collective is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bireme.chrome_trace import Recorded
from bireme.trace import RankSpans, Span, SpanKind

GAP_NS = 1000  # of work between two collectives


@dataclass(frozen=True)
class Sum:
    """One collective: its bytes, how much later than the first each rank comes, and what it takes from
    when the last has come."""

    num_bytes: int
    late_ns: Sequence[int]
    move_ns: int
    kind: SpanKind = SpanKind.ALL_REDUCE


def recorded_sums(steps: Sequence[Sequence[Sum]], width: int) -> Recorded:
    """One stage of `width` ranks; a step an inner list."""
    spans: list[list[Span]] = [[] for _ in range(width)]
    engine, now_ns = [], 0
    for step_id, sums in enumerate(steps):
        engine.append(Span(SpanKind.SUBMIT, now_ns, now_ns + GAP_NS, 0, step_id, 0))
        begun_ns = now_ns = now_ns + GAP_NS
        for one in sums:
            now_ns += GAP_NS
            end_ns = now_ns + max(one.late_ns) + one.move_ns
            for rank, late_ns in enumerate(one.late_ns):
                start_ns = now_ns + late_ns
                spans[rank].append(Span(one.kind, start_ns, end_ns, one.num_bytes, step_id, 0))
            now_ns = end_ns
        now_ns += GAP_NS
        for its in spans:
            its += [
                Span(SpanKind.COMPUTE, begun_ns, now_ns, 0, step_id, 0),
                Span(SpanKind.STEP, begun_ns, now_ns, 0, step_id, 0),
            ]
    ranks = [RankSpans(f"rank {rank}", 0, rank, its) for rank, its in enumerate(spans)]
    return Recorded(ranks, engine)
