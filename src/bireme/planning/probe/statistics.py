"""What repeated runs say: the median, for it is what one mostly gets, and how far they spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bireme.cluster.topology import Curve, Point

MIN_REPEATS = 3
MAX_REPEATS = 2000


def summarise(size: int, seconds: Sequence[float]) -> Point:
    if len(seconds) == 1:
        return Point(size, seconds[0], seconds[0], seconds[0])
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return Point(size, statistics.median(seconds), tenths[0], tenths[-1])


def num_repeats(repeat_s: float, budget_s: float) -> int:
    """Of what takes `repeat_s`, for about `budget_s` in all."""
    return max(MIN_REPEATS, min(MAX_REPEATS, int(budget_s / max(repeat_s, 1e-9))))


def latency_and_rate(curve: Curve) -> tuple[float, float]:
    """Seconds and bytes a second of latency_s + bytes / bytes_per_s, through both ends of a curve."""
    first, last = curve[0], curve[-1]
    if last.seconds <= first.seconds:
        return first.seconds, last.size_per_s
    return first.seconds, (last.size - first.size) / (last.seconds - first.seconds)
