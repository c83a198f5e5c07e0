"""What repeated runs are summed up to, how often they are repeated, and which points there are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bireme.cluster.topology import Point
from bireme.planning.probe.plan import plan_for
from bireme.planning.probe.statistics import (
    MAX_REPEATS,
    MIN_REPEATS,
    latency_and_rate,
    num_repeats,
    summarise,
)


def test_a_point_is_the_median_between_its_tenths() -> None:
    assert summarise(7, [float(second) for second in range(1, 12)]) == Point(7, 6.0, 2.0, 10.0)


def test_one_slow_run_in_many_moves_nothing() -> None:
    assert summarise(1, [1.0] * 20 + [1000.0]) == Point(1, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(("p90_s", "is_unsteady"), [(1.9, False), (2.1, True), (None, False)])
def test_a_point_says_if_it_is_unsteady(p90_s: float | None, is_unsteady: bool) -> None:
    assert Point(1, 1.5, 1.0, p90_s).is_unsteady is is_unsteady


def test_repeats_fill_the_budget_within_bounds() -> None:
    assert num_repeats(0.01, 0.5) == 50
    assert num_repeats(10.0, 0.5) == MIN_REPEATS
    assert num_repeats(0.0, 0.5) == MAX_REPEATS


@given(st.floats(1e-7, 1e-3), st.floats(1e6, 1e12))
def test_latency_and_rate_of_a_straight_line_are_found(
    latency_s: float, bytes_per_s: float
) -> None:
    sizes = [int(latency_s * bytes_per_s * scale) + 1 for scale in (0.01, 0.1, 1, 10, 100)]
    sizes = sorted(set(sizes))
    if len(sizes) < 3:
        return
    curve = tuple(Point(size, latency_s + size / bytes_per_s) for size in sizes)
    assert latency_and_rate(curve) == pytest.approx((latency_s, bytes_per_s), rel=1e-2)


def test_a_curve_that_falls_still_has_a_latency_and_a_rate() -> None:
    assert latency_and_rate((Point(1000, 2.0), Point(4000, 1.0))) == (2.0, 4000.0)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("is_quick", [True, False])
def test_every_size_of_a_plan_rises(kind: str, is_quick: bool) -> None:
    plan = plan_for(kind, is_quick=is_quick)
    for sizes in (plan.num_tokens, plan.message_bytes):
        assert list(sizes) == sorted(set(sizes))


def test_pairs_of_gpus_are_measured_one_by_one_and_ranks_of_a_cpu_are_alike() -> None:
    assert plan_for("cpu", is_quick=False).pairs(3) == [(0, 1)]
    assert plan_for("cpu", is_quick=False).groups(3) == [(0, 1), (0, 1, 2)]
    assert plan_for("cuda", is_quick=False).pairs(3) == [(0, 1), (0, 2), (1, 2)]
    assert plan_for("cuda", is_quick=False).groups(4)[-2:] == [(0, 1, 2), (0, 1, 2, 3)]
    assert plan_for("cpu", is_quick=False).pairs(1) == []
