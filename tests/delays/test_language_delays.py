"""A delay planted into a language model's ranks is in the ledger's row of its cause, and in no other."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from planting import IDLE_S, Interval, Plant, Planted, check, hold, within

from bireme import LLM, SamplingParams
from bireme.engine.pool import WorkerPool
from bireme.observe.causes import Row
from bireme.observe.ledger import make_ledger
from bireme.parallel.pipeline import stage_ranks

pytestmark = pytest.mark.slow

LAYOUTS = [(1, 1), (1, 1, 1, 1), (2,)]
PIPELINES = [(1, 1), (1, 1, 1, 1)]
GROUPS = [(2,), (2, 2)]
NUM_DELAYS = 2
PACE_S, SLOWEST_S = 0.005, 0.015


class Case:
    """A model in ranks that heed the plant."""

    def __init__(self, llm: LLM, plant: Plant) -> None:
        self.llm, self.plant = llm, plant
        self.widths = llm.config.parallel.widths
        self.num_ranks, self.num_stages = sum(self.widths), len(self.widths)
        self.engine = llm.start()

    @property
    def passes(self) -> range:
        """That are delayed: once all batches decode."""
        return range(2 * self.num_stages, 2 * self.num_stages + NUM_DELAYS)

    def generate(self, num_requests: int, num_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        prompts = [[5 + index, 6, 7] for index in range(num_requests)]
        self.llm.generate(prompts, params)

    def paces(self, slow: range = range(0)) -> list[float]:
        return [SLOWEST_S if rank in slow else PACE_S for rank in range(self.num_ranks)]


@pytest.fixture(scope="module")
def case(
    request: pytest.FixtureRequest, language_ranks: tuple[WorkerPool, Plant]
) -> Iterator[Case]:
    pool, plant = language_ranks
    plant.set([0] * sum(request.param))
    with LLM("demo", tensor_parallel_size=request.param, pool=pool) as llm:
        yield Case(llm, plant)


@pytest.mark.parametrize("case", [*PIPELINES, (2, 2)], ids=str, indirect=True)
def test_a_slow_stage_is_imbalance_of_the_others(case: Case) -> None:
    """A batch a stage, and one that waits: the slowest stage, which it was before, works all the time."""
    slow = stage_ranks(case.widths)[1]

    def run(delay_s: float) -> Planted:
        delays = dict.fromkeys(slow, delay_s / NUM_DELAYS)
        case.plant.set(case.paces(slow), delays, case.passes)
        num_groups = case.num_stages + 1
        case.generate(num_groups, 3 + case.passes.stop // num_groups)
        ledger = case.plant.ledger(case.llm.recorded(), slow[0])
        delay_ns = within(case.plant.sleeps(slow[0]), ledger)
        rows = [Row.COMPUTE if it in slow else Row.IMBALANCE for it in range(case.num_ranks)]
        return Planted(ledger, [{row: delay_ns} for row in rows])

    check(run)


@pytest.mark.parametrize("case", PIPELINES, ids=str, indirect=True)
def test_one_batch_in_flight_is_a_dependency_on_its_token(case: Case) -> None:
    """Each stage is delayed, and the others wait for it."""
    stages = stage_ranks(case.widths)

    def run(delay_s: float) -> Planted:
        delay = delay_s / NUM_DELAYS / case.num_stages
        case.plant.set(case.paces(), dict.fromkeys(range(case.num_ranks), delay), case.passes)
        case.generate(1, case.passes.stop + 2)
        ledger = case.plant.ledger(case.llm.recorded(), 0)
        slept = [within(case.plant.sleeps(ranks[0]), ledger) for ranks in stages]
        rows = [
            {Row.COMPUTE: slept[stage], Row.TOKEN_DEPENDENCY: sum(slept) - slept[stage]}
            for stage, ranks in enumerate(stages)
            for _ in ranks
        ]
        return Planted(ledger, rows)

    check(run)


@pytest.mark.parametrize("case", LAYOUTS, ids=str, indirect=True)
def test_an_empty_queue_starves_all_ranks(case: Case) -> None:
    def run(delay_s: float) -> Planted:
        case.plant.set(case.paces())
        case.generate(1, 1)
        held_ns = hold(delay_s)
        case.generate(1, 1)
        ledger = make_ledger(case.llm.recorded(), held_ns[0], time.monotonic_ns())
        return Planted(ledger, [{Row.STARVED: held_ns[1] - held_ns[0]}] * case.num_ranks)

    check(run, IDLE_S)


@pytest.mark.parametrize("case", GROUPS, ids=str, indirect=True)
def test_a_late_rank_is_waited_for_and_named(case: Case) -> None:
    """Its own row is compute; other stages are out of balance with it."""
    late = 1

    def run(delay_s: float) -> Planted:
        case.plant.set(case.paces(range(2)), {late: delay_s / NUM_DELAYS}, case.passes)
        num_groups = case.num_stages + 1
        case.generate(num_groups, 3 + case.passes.stop // num_groups)
        ledger = case.plant.ledger(case.llm.recorded(), late)
        delay_ns = within(case.plant.sleeps(late), ledger)
        if delay_s:
            assert ledger.ranks[0].late_ns[ledger.ranks[late].name] >= 0.95 * delay_ns
        rows = [Row.COLLECTIVE_WAIT, Row.COMPUTE, Row.IMBALANCE, Row.IMBALANCE]
        return Planted(ledger, [{row: delay_ns} for row in rows[: case.num_ranks]])

    check(run)


@pytest.mark.parametrize("case", LAYOUTS, ids=str, indirect=True)
def test_a_blocked_host_is_told_on_every_rank(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller takes its time over some tokens, and no step is told ahead."""
    monkeypatch.setattr(case.engine.scheduler, "max_in_flight", 1)

    def run(delay_s: float) -> Planted:
        case.plant.set(case.paces())
        params = SamplingParams(temperature=0, max_tokens=2 + NUM_DELAYS, ignore_eos=True)
        sleeps: list[Interval] = []
        for index, _ in enumerate(case.llm.stream([[5, 6, 7]], params)):
            if 0 < index <= NUM_DELAYS:
                sleeps.append(hold(delay_s / NUM_DELAYS))
        ledger = make_ledger(case.llm.recorded(), sleeps[0][0], sleeps[-1][1])
        return Planted(ledger, [{Row.HOST: within(sleeps, ledger)}] * case.num_ranks)

    check(run, IDLE_S)
