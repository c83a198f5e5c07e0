"""What a step is expected to cost, and when patience with it ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bireme.engine import deadline
from bireme.engine.deadline import Patience, StepCost, step_size
from bireme.request import ScheduledPiece

LIMIT_S = 300.0


def test_before_anything_was_seen_the_limit_applies() -> None:
    assert StepCost().patience_s([1], LIMIT_S) == LIMIT_S


def test_short_steps_get_two_seconds_and_long_ones_five_times_their_worst() -> None:
    cost = StepCost()
    for seconds in (0.001, 0.002):
        cost.observe(4, seconds)
    cost.observe(2048, 3.0)
    assert cost.patience_s([4], LIMIT_S) == 2.0
    assert cost.patience_s([2048], LIMIT_S) == 15.0
    assert cost.patience_s([2048, 2048], LIMIT_S) == 30.0
    assert cost.patience_s([2048] * 100, LIMIT_S) == LIMIT_S


def test_sizes_that_were_not_seen_are_scaled_up_and_never_down() -> None:
    cost = StepCost()
    cost.observe(16, 1.0)
    assert cost.expected_s(31) == 1.0
    assert cost.expected_s(32) == 2.0
    assert cost.expected_s(128) == 8.0
    assert cost.expected_s(1) == 1.0


def test_one_slow_step_fades() -> None:
    cost = StepCost()
    cost.observe(1, 100.0)
    for _ in range(1000):
        cost.observe(1, 0.01)
    assert cost.patience_s([1], LIMIT_S) == 2.0


def test_a_step_whose_end_nobody_saw_tells_no_more_than_a_bound() -> None:
    cost = StepCost()
    cost.observe(1, 1.0)
    cost.observe(1, 50.0, is_bound=True)
    assert cost.expected_s(1) == 1.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(deadline.time, "monotonic", lambda: now[0])
    return now


def test_patience_ends_where_nothing_moved_for_half_of_it(clock: list[float]) -> None:
    patience = Patience(4.0, LIMIT_S)
    assert patience.next_look == 1002.0
    clock[0] = 1002.0
    assert not patience.is_over(("rank 0", 7))
    clock[0] = patience.next_look
    assert patience.next_look == 1004.0
    assert patience.is_over(("rank 0", 7))
    assert patience.why_over == "no further for 2.0 s"


def test_what_gets_on_has_until_the_limit(clock: list[float]) -> None:
    patience, looks = Patience(4.0, 20.0), 0
    while not patience.is_over(looks):
        clock[0], looks = patience.next_look, looks + 1
    assert clock[0] == 1020.0
    assert patience.why_over == "not in 20 s"


def piece(start: int, num_tokens: int) -> ScheduledPiece:
    return ScheduledPiece(0, start, num_tokens, [5] * num_tokens, [[1]], samples=True)


@given(
    warm_up=st.integers(1, 16),
    start=st.integers(0, 100_000),
    num_tokens=st.integers(1, 5000),
    tile_rows=st.sampled_from([1, 2, 4, 8, 16]),
)
def test_a_step_in_tiles_is_waited_for_by_the_contexts_that_are_gathered(
    warm_up: int, start: int, num_tokens: int, tile_rows: int
) -> None:
    """Where that is all that takes time, 32 places at a time, and only a few tokens were seen before."""

    def seconds(start: int, num_tokens: int) -> float:
        stop = start + num_tokens
        longest = [min(stop, first + tile_rows) for first in range(start, stop, tile_rows)]
        return 1e-4 * tile_rows * sum(-(-context // 32) * 32 for context in longest)

    cost = StepCost()
    cost.observe(step_size([piece(0, warm_up)], is_tiled=True), seconds(0, warm_up))
    patience = cost.patience_s([step_size([piece(start, num_tokens)], is_tiled=True)], 1e9)
    assert patience >= seconds(start, num_tokens)


def test_a_step_of_several_requests_counts_their_tokens_and_a_little_of_their_contexts() -> None:
    assert step_size([piece(0, 7), piece(2000, 1), piece(100, 1)], is_tiled=False) == 9 + 2
