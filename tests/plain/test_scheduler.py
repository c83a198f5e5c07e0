"""The scheduler: every request ends as it would alone, no block is lost or read stale, nothing
waits for a token of its own batch, nobody starves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from replay import VOCABULARY, PrefixMatcher, ReplayExecutor, continued, prefixes

from bireme.engine.engine import Engine
from bireme.engine.limits import SchedulerLimits
from bireme.engine.scheduler import PRIORITY_SPAN_S, Scheduler
from bireme.engine.scripted import ScriptedExecutor
from bireme.errors import CapacityError
from bireme.parallel.layout import CacheKind
from bireme.request import Request, ScheduledBatch, StepOutput
from bireme.sampling_params import SamplingParams, StructuredOutputsParams

BLOCK = 4


def request(
    index: int,
    prompt: list[int] | int,
    max_tokens: int,
    structure: StructuredOutputsParams | None = None,
    **more: object,
) -> Request:
    ids = list(range(prompt)) if isinstance(prompt, int) else prompt
    return Request(
        request_id=str(index),
        prompt_token_ids=tuple(ids),
        params=SamplingParams(temperature=0, max_tokens=max_tokens, structured_outputs=structure),
        seed=index,
        **more,  # type: ignore[arg-type]
    )


def scheduler(
    pp_size: int = 1,
    max_tokens: int = 16,
    max_num_seqs: int = 4,
    kinds: tuple[CacheKind, ...] = (CacheKind(None, 40),),
    **more: object,
) -> Scheduler:
    limits = SchedulerLimits(
        pp_size=pp_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_tokens,
        block_size=BLOCK,
        **more,  # type: ignore[arg-type]
    )
    return Scheduler(limits, kinds)


def answer(batch: ScheduledBatch, token: int = 7) -> StepOutput:
    slots = batch.sampling_slots
    return StepOutput(*batch.header, slots, [[token]] * len(slots))


def batches(plan: Scheduler) -> Iterator[ScheduledBatch]:
    return iter(plan.schedule, None)  # type: ignore[arg-type]


# --- against a replay of what every stage reads and writes ------------------------------------------


@dataclass(frozen=True)
class Arrival:
    at_step: int
    prompt: tuple[int, ...]
    max_tokens: int
    has_eos: bool
    priority: int
    cancel_after: int | None  # steps
    match_len: int | None  # tokens of a structured answer; None: it is free

    def matcher(self) -> PrefixMatcher | None:
        return None if self.match_len is None else PrefixMatcher(self.prompt, self.match_len)

    @property
    def structure(self) -> StructuredOutputsParams | None:
        return None if self.match_len is None else StructuredOutputsParams(regex=".*")

    def expected(self, continuation: list[int], eos: frozenset[int]) -> tuple[list[int], str]:
        """What it gets if nobody cancels it, and why it ends."""
        ids = continuation[: self.max_tokens]
        for count, token_id in enumerate(ids, 1):
            if (self.has_eos and token_id in eos) or count == self.match_len:
                is_full = count == self.max_tokens and not (self.has_eos and token_id in eos)
                return ids[:count], "length" if is_full else "stop"
        return ids, "length"


def arrivals_of(random: Random, count: int) -> list[Arrival]:
    """Few different beginnings, so that prefixes are shared."""
    return [
        Arrival(
            at_step=random.choice([0, 0, 0, 1, 2, 5, 20]),
            prompt=tuple(at // 9 % 2 for at in range(random.randint(1, 24)))
            if random.random() < 0.5
            else tuple(random.choices(range(3), k=random.randint(1, 12))),
            max_tokens=random.randint(1, 16),
            has_eos=random.random() < 0.5,
            priority=random.randint(-2, 2),
            cancel_after=random.randint(0, 12) if random.random() < 0.2 else None,
            match_len=random.randint(1, 20) if random.random() < 0.3 else None,
        )
        for _ in range(count)
    ]


KINDS = st.sampled_from(
    [
        (CacheKind(None, 40),),
        (CacheKind(None, 11),),
        (CacheKind(None, 13), CacheKind(6, 9)),
        (CacheKind(5, 9),),
        (CacheKind(None, 14), CacheKind(3, 9), CacheKind(9, 10)),
    ]
)


@settings(max_examples=1000, deadline=None)
@given(
    st.integers(8, 20),
    st.integers(1, 4),
    st.sampled_from([1, 2, 3, 5, 8, 13]),
    st.sampled_from([2, 8]),
    KINDS,
    st.booleans(),
    st.sampled_from([float("inf"), 10.0]),
    st.integers(0, 2**32).map(Random),
)
def test_whatever_runs_beside_it_a_request_reads_its_own_tokens_and_ends_as_it_would_alone(
    num_requests: int,
    pp_size: int,
    max_tokens: int,
    max_num_seqs: int,
    kinds: tuple[CacheKind, ...],
    has_prefix_caching: bool,
    context_per_token: float,
    random: Random,
) -> None:
    arrivals = arrivals_of(random, num_requests)
    plan = scheduler(
        pp_size,
        max_tokens,
        max_num_seqs,
        kinds,
        has_prefix_caching=has_prefix_caching,
        context_per_token=context_per_token,
    )
    wanted = [continued(one.prompt, one.max_tokens + 2) for one in arrivals]
    truths = [prefixes([*one.prompt, *ids]) for one, ids in zip(arrivals, wanted, strict=True)]
    ends: dict[int, str] = {}
    executor = ReplayExecutor(pp_size, kinds, BLOCK, truths, random, ends.__contains__)
    engine = Engine(plan, executor)
    eos = frozenset(range(0, VOCABULARY, 5))
    fits = [
        plan.blocks.can_ever_hold(len(one.prompt) + one.max_tokens, max_tokens) for one in arrivals
    ]
    got: dict[int, list[int]] = {index: [] for index in range(len(arrivals))}
    added: dict[int, int] = {}
    for step in range(2000):
        for index, one in enumerate(arrivals):
            if one.at_step == step and fits[index]:
                own_eos = eos if one.has_eos else frozenset()
                engine.add(
                    request(
                        index,
                        list(one.prompt),
                        one.max_tokens,
                        one.structure,
                        eos_token_ids=own_eos,
                        priority=one.priority,
                        arrival_s=float(step),
                    ),
                    one.matcher(),
                )
                added[index] = step
            elif index in added and one.cancel_after == step - added[index] and index not in ends:
                engine.abort(str(index))
                ends[index] = "abort"
        for item in engine.step(wake=random.choice([None, 0])):
            index = int(item.request_id)
            got[index] += item.token_ids
            if item.finish_reason is not None:
                assert index not in ends, "a request ended twice"
                ends[index] = item.finish_reason
        plan.check_integrity()
        if step > 20 and not engine.has_unfinished:
            break
    assert ends.keys() == added.keys(), "a request starved"
    engine.settle()
    assert plan.blocks.num_used == 0
    event(f"preempted: {plan.num_preemptions > 0}")
    event(f"prefix hits: {plan.num_prefix_hits > 0}")
    for index, reason in ends.items():
        alone, why = arrivals[index].expected(wanted[index], eos)
        assert got[index] == alone[: len(got[index])]
        if reason != "abort":
            assert (got[index], reason) == (alone, why)


# --- single behaviours ------------------------------------------------------------------------------


def test_an_end_of_text_stops_a_request_and_drops_its_surplus_token() -> None:
    plan = scheduler()
    plan.add(request(0, 3, 10, eos_token_ids=frozenset({7})))
    first, second = plan.schedule(), plan.schedule()
    assert first is not None
    assert second is not None
    assert second.pieces[0].token_ids is None, (
        "the next decode does not wait for the last one's token"
    )
    assert [news.state.finish_reason for news in plan.update(answer(first))] == ["stop"]
    assert plan.update(answer(second)) == []
    assert not plan.has_unfinished


@pytest.mark.parametrize("pp_size", [2, 3, 4])
def test_while_one_group_passes_the_stages_the_next_waits_at_the_first_one(pp_size: int) -> None:
    """pp_size groups of equal size, and the first of them once more before its ids are known."""
    plan = scheduler(pp_size, max_tokens=64, max_num_seqs=12)
    for index in range(2 * pp_size):
        plan.add(request(index, 2, 8))
    for batch in list(batches(plan)):
        plan.update(answer(batch))
    for _ in range(3):
        flying = list(batches(plan))
        assert [len(batch.pieces) for batch in flying] == [2] * (pp_size + 1)
        slots = [frozenset(batch.sampling_slots) for batch in flying]
        assert slots[0] == slots[-1]
        assert len(set(slots)) == pp_size
        for batch in flying:
            plan.update(answer(batch))


def test_prompts_that_come_together_are_spread_over_the_stages() -> None:
    plan = scheduler(4, max_tokens=64)
    for index in range(4):
        plan.add(request(index, 5, 8))
    assert [len(batch.pieces) for batch in batches(plan)][:4] == [1, 1, 1, 1]


def test_groups_stay_even_when_requests_end() -> None:
    plan = scheduler(2, max_tokens=64, max_num_seqs=8)
    for index in range(8):  # those of one group end early
        plan.add(request(index, 2, 3 if index % 2 else 30))
    sizes: list[int] = []
    for _ in range(12):
        flying = list(batches(plan))
        sizes = [len(batch.pieces) for batch in flying]
        for batch in flying:
            plan.update(answer(batch))
    assert sizes == [2, 2, 2]


def test_chunks_of_a_long_prompt_follow_one_another_and_cost_the_same() -> None:
    plan = scheduler(3, max_tokens=1000, kinds=(CacheKind(None, 2000),), context_per_token=2000.0)
    plan.add(request(0, 5000, 2))
    sizes = []
    while len(flying := list(batches(plan))) == plan.max_in_flight:
        sizes += [batch.num_tokens for batch in flying if not batch.sampling_slots]
        for batch in flying:
            plan.update(answer(batch))
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    costs = [n * (1 + (start + n / 2) / 2000) for n, start in zip(sizes, starts, strict=True)]
    assert sizes == sorted(sizes, reverse=True)
    assert max(costs) < 1.1 * min(costs)


def test_decodes_go_on_beside_a_long_prompt() -> None:
    plan = scheduler(max_tokens=8, kinds=(CacheKind(None, 100),))
    plan.add(request(0, 2, 50))
    for batch in list(batches(plan)):
        plan.update(answer(batch))
    plan.add(request(1, 80, 2))
    for _ in range(5):
        for batch in list(batches(plan)):
            assert batch.pieces[0].num_tokens == 1
            assert batch.num_tokens == 8
            plan.update(answer(batch))


def test_setups_come_with_the_first_piece_of_a_request_only() -> None:
    plan = scheduler(max_tokens=4)
    plan.add(request(0, 10, 2))
    first, second = plan.schedule(), plan.schedule()
    assert first is not None
    assert second is not None
    assert [setup.slot for setup in first.setups] == [0]
    assert second.setups == []
    assert (second.pieces[0].start, second.pieces[0].num_tokens) == (4, 3)  # and 3 behind it


def test_a_second_prompt_computes_only_what_the_first_did_not() -> None:
    plan = scheduler(max_tokens=64)
    plan.add(request(0, 18, 4))
    plan.add(request(1, 18, 4))
    batch = plan.schedule()
    assert batch is not None
    assert [(piece.start, piece.num_tokens) for piece in batch.pieces] == [(0, 18), (16, 2)]
    first, second = (piece.new_blocks[0] for piece in batch.pieces)
    assert first[:4] == second[:4]
    assert first[4] != second[4]
    assert plan.num_prefix_hits == 16


def test_prompt_logprobs_compute_the_whole_prompt() -> None:
    plan = scheduler(max_tokens=64)
    plan.add(request(0, 18, 4))
    asking = Request(
        request_id="1",
        prompt_token_ids=tuple(range(18)),
        params=SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=1),
        seed=1,
    )
    plan.add(asking)
    batch = plan.schedule()
    assert batch is not None
    assert [piece.start for piece in batch.pieces] == [0, 0]
    assert batch.setups[1].sampling.token_ids == list(range(18))


def test_where_prefixes_depend_on_the_longest_length_they_are_shared_with_the_same_only() -> None:
    plan = scheduler(max_tokens=64, depends_on_length=True, max_num_seqs=3)
    for index, max_tokens in enumerate((4, 5, 4)):
        plan.add(request(index, 18, max_tokens))
    batch = plan.schedule()
    assert batch is not None
    assert [piece.start for piece in batch.pieces] == [0, 0, 16]


def test_a_more_urgent_request_goes_first_and_an_old_one_is_not_overtaken_for_ever() -> None:
    plan = scheduler(max_num_seqs=1)
    plan.add(request(0, 2, 1, priority=1, arrival_s=0.0))
    plan.add(request(1, 2, 1, priority=0, arrival_s=1.0))
    plan.add(request(2, 2, 1, priority=0, arrival_s=PRIORITY_SPAN_S + 1))
    order = []
    while plan.has_unfinished:
        for batch in list(batches(plan)):
            order += [news.state.request.request_id for news in plan.update(answer(batch))]
    assert order == ["1", "0", "2"]


def test_the_youngest_gives_its_blocks_back_and_ends_all_the_same() -> None:
    plan = scheduler(kinds=(CacheKind(None, 7),), max_num_seqs=2, has_prefix_caching=False)
    plan.add(request(0, 8, 12))
    plan.add(request(1, 7, 12))
    got: Counter[str] = Counter()
    while plan.has_unfinished:
        for batch in list(batches(plan)):
            for news in plan.update(answer(batch)):
                got[news.state.request.request_id] += len(news.token_ids)
                if news.state.num_preemptions:
                    assert news.state.request.request_id == "1"
    assert plan.num_preemptions > 0
    assert got == {"0": 12, "1": 12}


def test_a_full_queue_and_a_request_larger_than_the_cache_are_refused() -> None:
    plan = scheduler(max_num_waiting=1, max_num_seqs=2, kinds=(CacheKind(None, 6),))
    with pytest.raises(CapacityError, match="can reach 30 tokens"):
        plan.add(request(0, 20, 10))
    for index in range(3):
        plan.add(request(index, 3, 3))
    with pytest.raises(CapacityError, match="3 requests are there, of which 2 may run and 1 wait"):
        plan.add(request(3, 3, 3))


def test_a_burst_that_comes_before_a_step_finds_all_seats() -> None:
    plan = scheduler(max_num_waiting=1, max_num_seqs=4)
    assert plan.room_to_wait == 5
    for index in range(5):
        plan.add(request(index, 3, 3))
    assert plan.room_to_wait == 0
    plan.schedule()
    assert (plan.room_to_wait, plan.num_running, plan.num_waiting) == (0, 4, 1)


def test_a_deadline_ends_a_request_that_waits_and_one_that_runs() -> None:
    plan = scheduler(max_num_seqs=1)
    plan.add(request(0, 3, 30, deadline_s=5.0))
    plan.add(request(1, 3, 30, deadline_s=7.0))
    batch = plan.schedule()
    assert plan.take_expired(4.9) == []
    assert [state.finish_reason for state in plan.take_expired(7.0)] == ["timeout", "timeout"]
    assert batch is not None
    assert plan.update(answer(batch)) == []
    plan.check_integrity()


def test_an_idle_engine_notices_blocks_that_are_held_by_no_request() -> None:
    plan = scheduler()
    engine = Engine(plan, ScriptedExecutor({}))
    engine.settle()
    free = plan.blocks._pools[0]._free
    taken = free.pop()
    with pytest.raises(AssertionError, match="held by no request"):
        engine.settle()
    free.append(free[0])  # as many as there should be
    with pytest.raises(AssertionError, match="lost or held twice"):
        plan.check_integrity()
    free[-1] = taken
    plan.check_integrity()


def test_a_cancelled_request_is_not_in_the_next_batch_and_its_blocks_are_free() -> None:
    plan = scheduler()
    plan.add(request(0, 3, 30))
    plan.add(request(1, 3, 30))
    first = plan.schedule()
    plan.abort("0")
    second = plan.schedule()
    assert first is not None
    assert second is not None
    assert [piece.slot for piece in second.pieces] == [1]
    assert [news.state.request.request_id for news in plan.update(answer(first))] == ["1"]


def test_windowed_layers_keep_no_more_blocks_than_they_look_back_at() -> None:
    plan = scheduler(
        max_tokens=8, kinds=(CacheKind(None, 40), CacheKind(8, 40)), has_prefix_caching=False
    )
    plan.add(request(0, 60, 40))
    most = 0
    while plan.has_unfinished:
        for batch in list(batches(plan)):
            _full, windowed = (39 - count for count in plan.blocks.num_available)
            most = max(most, windowed)
            plan.update(answer(batch))
    assert most <= (8 + 8) // BLOCK + 1


def test_a_temperature_that_would_overflow_is_greedy() -> None:
    params = [SamplingParams(temperature=t) for t in (0.0, 1e-39, 9e-6, 1e-5)]
    assert [param.is_greedy for param in params] == [True, True, True, False]


def test_a_long_prompt_does_not_keep_others_out_of_layers_that_look_back_a_little() -> None:
    kinds = (CacheKind(None, 200), CacheKind(8, 12))
    plan = scheduler(max_tokens=8, kinds=kinds, has_prefix_caching=False)
    plan.add(request(0, 404, 2))
    plan.add(request(1, 4, 2))
    while plan.num_waiting:
        for batch in list(batches(plan)):
            assert plan.update(answer(batch)) == [], "it waited for the end of the long prompt"


def test_no_more_requests_are_admitted_than_the_next_steps_can_begin() -> None:
    plan = scheduler(max_tokens=16, max_num_seqs=64, kinds=(CacheKind(None, 400),))
    for index in range(64):
        plan.add(request(index, [index] * 8, 8))
    flying = [batch for batch in [plan.schedule()] if batch is not None]
    assert plan.num_running == 4
    while plan.num_running < 12:
        flying += batches(plan)
        assert flying[0].num_tokens == 16, "it was short of work"
        plan.update(answer(flying.pop(0)))


def test_requests_that_share_a_prompt_are_admitted_by_what_is_left_to_compute() -> None:
    plan = scheduler(max_tokens=64, max_num_seqs=32, kinds=(CacheKind(None, 400),))
    for index in range(20):
        plan.add(request(index, 41, 8))
    plan.schedule()
    plan.schedule()
    assert plan.num_running == 20
