"""The scheduler: every request ends, no block is lost, nothing waits for a token of its own batch."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bireme.engine.scheduler import Scheduler
from bireme.parallel.layout import CacheKind
from bireme.request import Request, ScheduledBatch, StepOutput
from bireme.sampling_params import SamplingParams

REQUESTS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=12)


def request(
    index: int, num_prompt: int, max_tokens: int, eos: frozenset[int] = frozenset()
) -> Request:
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return Request(
        request_id=str(index),
        prompt_token_ids=tuple(range(num_prompt)),
        params=params,
        seed=0,
        eos_token_ids=eos,
    )


def scheduler(
    pp_size: int, max_tokens: int = 16, max_num_seqs: int = 4, num_blocks: int = 40
) -> Scheduler:
    return Scheduler(
        pp_size=pp_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_tokens,
        kinds=[CacheKind(None, num_blocks)],
        block_size=4,
    )


class Replay:
    """Executes batches in order and checks that each token is written where it must be."""

    def __init__(self) -> None:
        self.lengths: dict[int, int] = {}
        self.blocks: dict[int, list[int]] = {}

    def run(self, batch: ScheduledBatch, token: int = 7) -> StepOutput:
        for setup in batch.setups:
            self.lengths[setup.slot], self.blocks[setup.slot] = 0, []
        for piece in batch.pieces:
            assert piece.start == self.lengths[piece.slot], "a token was skipped or computed twice"
            self.lengths[piece.slot] += piece.num_tokens
            self.blocks[piece.slot] += piece.new_blocks[0]
            assert len(self.blocks[piece.slot]) * 4 >= self.lengths[piece.slot], (
                "a token has no place"
            )
            assert piece.token_ids is None or len(piece.token_ids) == piece.num_tokens
        slots = batch.sampling_slots
        return StepOutput(batch.incarnation, batch.step_id, slots, [[token]] * len(slots))


@given(REQUESTS, st.integers(1, 4), st.integers(1, 20), st.randoms(use_true_random=False))
def test_every_request_gets_its_tokens_with_any_lag(
    sizes: list[tuple[int, int]], pp_size: int, max_tokens: int, random: object
) -> None:
    plan = scheduler(pp_size, max_tokens)
    for index, (num_prompt, wanted) in enumerate(sizes):
        plan.add(request(index, num_prompt, wanted))
    replay, in_flight = Replay(), deque[ScheduledBatch]()
    got: dict[str, int] = {}
    while plan.has_unfinished:
        batch = plan.schedule() if random.random() < 0.7 or not in_flight else None  # type: ignore[attr-defined]
        if batch is not None:
            assert batch.num_tokens <= max_tokens
            in_flight.append(batch)
            assert len(in_flight) <= pp_size + 1
        elif in_flight:
            for run, ids in plan.update(replay.run(in_flight.popleft())):
                got[run.request.request_id] = got.get(run.request.request_id, 0) + len(ids)
        plan.blocks.check_integrity()
    assert got == {str(index): wanted for index, (_, wanted) in enumerate(sizes)}
    assert plan.blocks.num_used == 0


def test_an_end_of_text_stops_a_request_and_drops_its_surplus_token() -> None:
    plan = scheduler(pp_size=1)
    plan.add(request(0, 3, 10, eos=frozenset({7})))
    first, second = plan.schedule(), plan.schedule()
    assert first is not None
    assert second is not None
    assert second.pieces[0].token_ids is None, (
        "the next decode does not wait for the last one's token"
    )
    replay = Replay()
    news = plan.update(replay.run(first))
    assert [run.finish_reason for run, _ in news] == ["stop"]
    assert plan.update(replay.run(second)) == []
    assert not plan.has_unfinished


def test_with_stages_a_request_has_one_decode_in_flight_and_others_fill_the_pipeline() -> None:
    plan = scheduler(pp_size=2, max_tokens=64)
    for index in range(3):
        plan.add(request(index, 2, 8))
    batches = [plan.schedule() for _ in range(4)]
    assert batches[3] is None
    slots = [piece.slot for batch in batches[:3] if batch for piece in batch.pieces]
    assert sorted(slots) == sorted(set(slots))


@pytest.mark.parametrize("pp_size", [2, 3])
def test_running_requests_are_spread_evenly_over_the_batches_in_flight(pp_size: int) -> None:
    """From the first step on and ever after, so that no stage waits for one full batch."""
    plan = scheduler(pp_size, max_tokens=64, max_num_seqs=12)
    for index in range(2 * (pp_size + 1)):
        plan.add(request(index, 2, 8))
    replay = Replay()
    for _ in range(4):
        batches = list(iter(plan.schedule, None))
        assert [len(batch.pieces) for batch in batches] == [2] * (pp_size + 1)
        for batch in batches:
            plan.update(replay.run(batch))


def test_a_request_waits_until_all_its_blocks_are_free() -> None:
    plan = scheduler(pp_size=1, num_blocks=6)
    plan.add(request(0, 8, 4))
    plan.add(request(1, 8, 4))
    batch = plan.schedule()
    assert batch is not None
    assert [piece.slot for piece in batch.pieces] == [0]


def test_setups_come_with_the_first_piece_of_a_request_only() -> None:
    plan = scheduler(pp_size=1, max_tokens=4)
    plan.add(request(0, 10, 2))
    first, second = plan.schedule(), plan.schedule()
    assert first is not None
    assert second is not None
    assert [setup.slot for setup in first.setups] == [0]
    assert second.setups == []
    assert (second.pieces[0].start, second.pieces[0].num_tokens) == (4, 4)


def test_a_temperature_that_would_overflow_is_greedy() -> None:
    params = [SamplingParams(temperature=t) for t in (0.0, 1e-39, 9e-6, 1e-5)]
    assert [param.is_greedy for param in params] == [True, True, True, False]
