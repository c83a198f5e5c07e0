"""Where throughput stops growing with a size that is chosen: of batches, or of chunks."""

from __future__ import annotations

from collections.abc import Mapping

_ENOUGH = 0.9  # of the most: what is gained beyond is paid for in latency


def best_size(rates: Mapping[int, float]) -> int | None:
    """The smallest size whose rate is nearly the highest; None of nothing."""
    most = max(rates.values(), default=0.0)
    return min((size for size, rate in rates.items() if rate >= _ENOUGH * most), default=None)
