"""What repeated runs say: the median, for it is what one mostly gets, and how far they spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from bireme.cluster.topology import Curve, Point

MIN_REPEATS = 3
MAX_REPEATS = 2000


def summarise(size: int, seconds: Sequence[float]) -> Point:
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return Point(size, *map(rounded, (statistics.median(seconds), tenths[0], tenths[-1])))


def rounded(value: float) -> float:
    """To four digits: what is behind them is noise."""
    return float(f"{value:.4g}")


def num_repeats(repeat_s: float, budget_s: float) -> int:
    """Of what takes `repeat_s`, for about `budget_s` in all."""
    return max(MIN_REPEATS, min(MAX_REPEATS, int(budget_s / max(repeat_s, 1e-9))))


def latency_and_rate(curve: Curve) -> tuple[float, float]:
    """The latency_s and bytes_per_s whose latency_s + bytes / bytes_per_s is least wrong in relation to
    what each size took (least squares); from both ends where that gives none above 0."""
    seconds = np.array([point.seconds for point in curve])
    sizes = np.array([point.size for point in curve], dtype=float)
    terms = np.stack((1 / seconds, sizes / seconds), axis=1)
    latency_s, s_per_byte = np.linalg.lstsq(terms, np.ones(len(curve)))[0]
    if latency_s <= 0 or s_per_byte <= 0:
        return curve[0].seconds, curve[-1].size_per_s
    return rounded(latency_s), rounded(1 / s_per_byte)
