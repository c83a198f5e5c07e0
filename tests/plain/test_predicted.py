"""What a plan predicts is what its schedule and its costs say, and its ledger tells the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bireme.observe.causes import Row
from bireme.observe.ledger import Ledger, make_ledger
from bireme.parallel.pipeline import bubble_shares, forward_schedule, timeline
from bireme.vision.plan import BlockCost, Work, make_plan
from bireme.vision.predicted import Prediction, StageCost, predict, stage_costs

COSTS = st.lists(st.floats(1e-3, 1e-1), min_size=1, max_size=4)
SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=6)
MOVED_S = st.floats(0, 1e-2)


def predicted(costs: list[StageCost], sizes: list[int]) -> tuple[Prediction, Ledger]:
    found = predict(costs, sizes, [f"rank {it}" for it in range(len(costs))])
    return found, make_ledger(found.recorded)


def without_transfer(compute_s: list[float]) -> list[StageCost]:
    return [StageCost(0.0, cost, 0.0) for cost in compute_s]


@given(COSTS, SIZES)
def test_its_bubble_is_the_schedules(compute_s: list[float], sizes: list[int]) -> None:
    found, ledger = predicted(without_transfer(compute_s), sizes)
    schedule = forward_schedule(len(compute_s), len(sizes))
    times = timeline(schedule, lambda it: compute_s[it.stage] * sizes[it.micro_batch])
    assert found.bubbles == pytest.approx(bubble_shares(schedule, times))
    for rank, bubble in zip(ledger.ranks, found.bubbles, strict=True):
        assert 1 - rank.share(Row.COMPUTE) == pytest.approx(bubble, abs=1e-5)


@given(COSTS, SIZES, MOVED_S)
def test_every_moment_is_accounted_for(
    compute_s: list[float], sizes: list[int], moved_s: float
) -> None:
    moved = [0.0, *[moved_s] * (len(compute_s) - 1), 0.0]
    costs = [StageCost(moved[i], cost, moved[i + 1]) for i, cost in enumerate(compute_s)]
    found, ledger = predicted(costs, sizes)
    assert (ledger.end_ns - ledger.start_ns) / 1e9 == pytest.approx(found.elapsed_s)
    for rank, bubble in zip(ledger.ranks, found.bubbles, strict=True):
        assert rank.ns[Row.UNATTRIBUTED] == 0
        assert rank.ns[Row.HOST] == 0, "nothing but the actions takes time"
        assert 1 - rank.share(Row.COMPUTE) == pytest.approx(bubble, abs=1e-5)


@given(st.integers(1, 5), st.integers(1, 8))
def test_equal_stages_have_the_bubble_of_the_textbook(num_stages: int, num: int) -> None:
    found, ledger = predicted(without_transfer([0.01] * num_stages), [1] * num)
    textbook = (num_stages - 1) / (num + num_stages - 1)
    assert found.bubbles == pytest.approx([textbook] * num_stages)
    for rank in ledger.ranks:
        assert rank.share(Row.FILL_DRAIN) == pytest.approx(textbook)


def test_a_hand_over_takes_time_on_both_sides() -> None:
    found, ledger = predicted([StageCost(0.0, 0.01, 0.002), StageCost(0.003, 0.01, 0.0)], [1])
    assert found.elapsed_s == pytest.approx(0.025)
    for rank in ledger.ranks:
        assert rank.ns[Row.TRANSFER] == 5_000_000, "from when it was sent until it was there"
        assert rank.ns[Row.COMPUTE] == rank.ns[Row.FILL_DRAIN] == 10_000_000


def test_costs_are_those_of_one_image() -> None:
    blocks = [BlockCost(str(i), 0.04 * (i + 1), 0.008, 1, 1, 1) for i in range(3)]
    plan = make_plan(blocks, 2, Work(batch=8, micro_batch=8, image_bytes=1), None, [2])
    first, second = stage_costs(plan, 4)
    assert (first.receive_s, first.compute_s, first.send_s) == pytest.approx((0.0, 0.03, 0.002))
    assert (second.receive_s, second.compute_s, second.send_s) == pytest.approx((0.002, 0.03, 0.0))


def test_steps_are_numbered_as_those_of_a_run() -> None:
    found = predict(without_transfer([0.1]), [1, 1], ["rank 0"], first_step=7)
    assert {span.step_id for span in found.recorded.ranks[0].spans} == {7, 8}
