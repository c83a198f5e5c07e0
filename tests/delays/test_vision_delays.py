"""A delay planted into a vision pipeline's ranks is in the ledger's row of its cause, and in no other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from planting import IDLE_S, NETWORK, Interval, Plant, Planted, check, hold, within

from bireme.engine.pool import WorkerPool
from bireme.engine.world import World
from bireme.observe.causes import Row
from bireme.observe.ledger import make_ledger
from bireme.vision.pipeline import RankSettings, VisionPipeline, micro_batch_sizes
from bireme.vision.preprocessing import made_up_images
from bireme.vision.tracing import Traced

pytestmark = pytest.mark.slow

NUM_DELAYS = 2
PACE_S, SLOWEST_S = 0.005, 0.015
SLOW = 1  # the stage


class Case:
    """A model in ranks that heed the plant."""

    def __init__(self, pipeline: VisionPipeline, plant: Plant, num_stages: int) -> None:
        self.pipeline, self.plant, self.num_stages = pipeline, plant, num_stages


def num_images(num_stages: int) -> int:
    """Micro-batches enough for the first stage to have work while later ones are delayed."""
    return 2 * num_stages + NUM_DELAYS + 4


@pytest.fixture(scope="module", params=[2, 4])
def case(
    request: pytest.FixtureRequest, vision_ranks: tuple[WorkerPool, Plant], traced: Traced
) -> Iterator[Case]:
    num_stages, (pool, plant) = request.param, vision_ranks
    counts = micro_batch_sizes(len(traced.blocks), num_stages)
    images = made_up_images(num_images(num_stages), NETWORK.image_shape)
    ranks = RankSettings(devices=("cpu",) * num_stages, num_threads=1)
    with VisionPipeline.open(NETWORK, traced, counts, images, pool, ranks) as pipeline:
        yield Case(pipeline, plant, num_stages)


def test_a_slow_stage_is_imbalance_of_the_others(case: Case) -> None:
    paces = [SLOWEST_S if stage == SLOW else PACE_S for stage in range(case.num_stages)]
    first = case.num_stages + 1

    def run(delay_s: float) -> Planted:
        passes = range(first, first + NUM_DELAYS)
        case.plant.set(paces, {SLOW: delay_s / NUM_DELAYS}, passes)
        case.pipeline.run(num_images(case.num_stages))
        ledger = case.plant.ledger(case.pipeline.recorded(), SLOW)
        delay_ns = within(case.plant.sleeps(SLOW), ledger)
        rows = [Row.COMPUTE if it == SLOW else Row.IMBALANCE for it in range(case.num_stages)]
        return Planted(ledger, [{row: delay_ns} for row in rows])

    check(run)


def test_one_micro_batch_fills_and_drains(case: Case) -> None:
    """It waits for no token: each stage idles before it has come, and once it is through."""
    stages = range(case.num_stages)

    def run(delay_s: float) -> Planted:
        delay = delay_s / NUM_DELAYS / case.num_stages
        case.plant.set([PACE_S] * case.num_stages, dict.fromkeys(stages, delay), range(NUM_DELAYS))
        for _ in range(NUM_DELAYS):
            case.pipeline.run(1)
        ledger = case.plant.ledger(case.pipeline.recorded(), 0)
        slept = [within(case.plant.sleeps(stage), ledger) for stage in stages]
        rows = [
            {Row.COMPUTE: slept[stage], Row.FILL_DRAIN: sum(slept) - slept[stage]}
            for stage in stages
        ]
        return Planted(ledger, rows)

    check(run)


def test_an_empty_queue_starves_all_ranks(case: Case) -> None:
    def run(delay_s: float) -> Planted:
        case.plant.set([PACE_S] * case.num_stages)
        case.pipeline.run(1)
        held_ns = hold(delay_s)
        case.pipeline.run(1)
        ledger = make_ledger(case.pipeline.recorded(), held_ns[0], time.monotonic_ns())
        return Planted(ledger, [{Row.STARVED: held_ns[1] - held_ns[0]}] * case.num_stages)

    check(run, IDLE_S)


def test_a_blocked_host_is_told_on_every_rank(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is held up while it tells of a batch."""
    send_all = World.send_all

    def run(delay_s: float) -> Planted:
        sleeps: list[Interval] = []

        def held_up(self: World, *args: Any) -> None:
            sleeps.append(hold(delay_s))
            send_all(self, *args)

        case.plant.set([PACE_S] * case.num_stages)
        with monkeypatch.context() as patch:
            patch.setattr(World, "send_all", held_up)
            case.pipeline.run(1)
        ledger = make_ledger(case.pipeline.recorded(), sleeps[0][0], time.monotonic_ns())
        return Planted(ledger, [{Row.HOST: within(sleeps, ledger)}] * case.num_stages)

    check(run, IDLE_S)
