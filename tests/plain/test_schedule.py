"""Schedules as data: what they cost, how they print, and what they cannot be."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bireme.errors import CapacityError, ConfigError
from bireme.parallel.pipeline import (
    Action,
    bubble_shares,
    forward_schedule,
    grid,
    partition,
    timeline,
)

SIZES = st.integers(1, 5)


@given(SIZES, SIZES)
def test_equal_stages_have_the_bubble_of_the_textbook(num_stages: int, num_micro: int) -> None:
    schedule = forward_schedule(num_stages, num_micro)
    shares = bubble_shares(schedule, timeline(schedule, lambda _: 2.0))
    expected = (num_stages - 1) / (num_micro + num_stages - 1)
    assert shares == pytest.approx((expected,) * num_stages)


@given(SIZES, SIZES, st.data())
def test_actions_begin_as_soon_as_both_things_before_them_are_done(
    num_stages: int, num_micro: int, data: st.DataObject
) -> None:
    schedule = forward_schedule(num_stages, num_micro)
    costs = {a: data.draw(st.integers(1, 9)) for actions in schedule for a in actions}
    times = timeline(schedule, costs.__getitem__)
    for action, (start, end) in times.items():
        before = [
            times[other][1]
            for other in (
                Action(action.stage - 1, action.micro_batch),
                Action(action.stage, action.micro_batch - 1),
            )
            if other in times
        ]
        assert start == max(before, default=0)
        assert end - start == costs[action]


@given(SIZES, SIZES)
def test_the_grid_shows_every_action_once_and_each_column_is_one_time(
    num_stages: int, num_micro: int
) -> None:
    rows = [row.split()[2:] for row in grid(forward_schedule(num_stages, num_micro)).split("\n")]
    assert {len(row) for row in rows} == {num_stages + num_micro - 1}
    for stage, row in enumerate(rows):
        assert row.index(f"{stage}F0") == stage
        assert [Action.parse(cell) for cell in row if cell != "."] == [
            Action(stage, index) for index in range(num_micro)
        ]


def test_the_grid_of_three_stages() -> None:
    assert grid(forward_schedule(3, 2)) == (
        "rank 0  0F0 0F1   .   .\n"
        "rank 1    . 1F0 1F1   .\n"
        "rank 2    .   . 2F0 2F1"
    )  # fmt: skip


def test_one_rank_can_hold_several_stages() -> None:
    schedule = ((Action(0, 0), Action(2, 0)), (Action(1, 0),))
    assert timeline(schedule, lambda _: 1.0)[Action(2, 0)] == (2.0, 3.0)


def test_what_waits_for_itself_or_is_no_action_is_refused() -> None:
    with pytest.raises(ConfigError, match="never comes to 1F0"):
        timeline(((Action(1, 0), Action(0, 0)),), lambda _: 1.0)
    with pytest.raises(ConfigError, match="'2B0' is no action"):
        Action.parse("2B0")


@given(st.data())
def test_no_other_cut_that_fits_has_a_faster_slowest_stage(data: st.DataObject) -> None:
    """Against all cuts: with transfers at either side, and devices that hold so many bytes."""
    num_layers = data.draw(st.integers(1, 6))
    numbers = st.lists(st.integers(1, 20), min_size=num_layers, max_size=num_layers)
    costs, transfers, sizes = (data.draw(numbers) for _ in range(3))
    num_stages, limit = data.draw(st.integers(1, num_layers)), data.draw(st.integers(1, 80))

    def fits(start: int, stop: int) -> bool:
        return sum(sizes[start:stop]) <= limit

    def slowest(cuts: tuple[int, ...]) -> float:
        stages = list(pairwise((0, *cuts, num_layers)))
        if not all(fits(*stage) for stage in stages):
            return float("inf")
        moved = [0, *(transfers[cut - 1] for cut in cuts), 0]
        return max(sum(costs[a:b]) + moved[i] + moved[i + 1] for i, (a, b) in enumerate(stages))

    best = min(slowest(cuts) for cuts in combinations(range(1, num_layers), num_stages - 1))
    if best == float("inf"):
        with pytest.raises(CapacityError, match="fits the devices"):
            partition(costs, [1] * num_stages, transfer_costs=transfers, fits=fits)
        return
    counts = partition(costs, [1] * num_stages, transfer_costs=transfers, fits=fits)
    assert slowest(tuple(sum(counts[: i + 1]) for i in range(num_stages - 1))) == best
