"""The meter of token dependency, on spans made by hand (milliseconds stand for nanoseconds)."""

from __future__ import annotations

import pytest

from bireme.observe.token_dependency import token_dependency_shares
from bireme.trace import Span, SpanKind


def step(step_id: int, start: int, work: int, end: int, *, received: int = 0) -> list[Span]:
    """A step that begins at `start`, receives just before `work`, and ends at `end`."""

    def span(kind: SpanKind, begin: int, stop: int) -> Span:
        return Span(kind, begin, stop, 0, step_id, 0)

    return [
        span(SpanKind.RECV, work - received, work),
        span(SpanKind.COMPUTE, work, end),
        span(SpanKind.STEP, start, end),
    ]


def stage(*steps: list[Span]) -> list[Span]:
    return [span for one in steps for span in one]


def test_one_batch_in_flight_leaves_each_of_two_stages_idle_for_half_the_time() -> None:
    first = stage(*(step(index, 20 * index, 20 * index, 20 * index + 10) for index in range(4)))
    last = stage(
        *(step(k, 20 * k + 10, 20 * k + 10, 20 * k + 20, received=0) for k in range(4))
    )  # fmt: skip
    assert token_dependency_shares([first, last], 0, 3) == [0.5, 0.5]


def test_a_first_stage_that_receives_ids_waits_for_them() -> None:
    first = stage(step(0, 0, 0, 10), step(1, 10, 14, 20, received=4))
    last = stage(step(0, 10, 10, 14), step(1, 20, 20, 24))
    assert token_dependency_shares([first, last], 0, 1) == [0.4, 0.4]


def test_stages_that_are_always_at_work_wait_for_nothing() -> None:
    first = stage(*(step(index, 10 * index, 10 * index, 10 * index + 10) for index in range(5)))
    last = stage(*(step(k, 10 * k + 10, 10 * k + 10, 10 * k + 20) for k in range(5)))
    assert token_dependency_shares([first, last], 0, 4) == [0.0, 0.0]


def test_a_slow_stage_before_makes_no_token_dependency() -> None:
    first = stage(*(step(index, 10 * index, 10 * index, 10 * index + 10) for index in range(5)))
    last = stage(*(step(k, 10 * k, 10 * k + 10, 10 * k + 12, received=8) for k in range(5)))
    assert token_dependency_shares([first, last], 0, 4) == [0.0, 0.0]


def test_time_after_all_ids_are_known_is_the_hosts() -> None:
    first = stage(step(0, 0, 0, 10), step(1, 30, 30, 40))
    last = stage(step(0, 10, 10, 12), step(1, 40, 40, 42))
    assert token_dependency_shares([first, last], 0, 1) == [2 / 30, 2 / 30]


def test_steps_that_the_ring_has_lost_are_an_error() -> None:
    with pytest.raises(ValueError, match="stage 0 has spans of 1 of the steps 0 to 1"):
        token_dependency_shares([stage(step(1, 0, 0, 10))], 0, 1)
