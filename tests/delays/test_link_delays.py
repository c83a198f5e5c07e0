"""What a shaped link takes for its bytes is transfer, on every rank that waits for what goes over it.

The ranks of a pipeline's first half are in one network namespace, the others in another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import count

import pytest
from hosts import BURST_BYTES, Hosts
from planting import NETWORK, Plant, Planted, check

from bireme import LLM, SamplingParams
from bireme.chrome_trace import Recorded
from bireme.engine.pool import WorkerPool
from bireme.observe.causes import Row
from bireme.observe.ledger import make_ledger
from bireme.vision.pipeline import RankSettings, VisionPipeline, micro_batch_sizes
from bireme.vision.preprocessing import made_up_images
from bireme.vision.tracing import Traced

pytestmark = pytest.mark.slow

NUM_IMAGES = 10
FAST = 10**9  # bytes a second


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts() as made:
        yield made


def check_link(
    hosts: Hosts,
    num_ranks: int,
    pass_on: Callable[[], object],
    recorded: Callable[[], Recorded],
    least_s: float = 0,
) -> None:
    """`pass_on` sends the same bytes over the link each time, which takes at least `least_s`."""
    with hosts.shaped(FAST):
        pass_on()
        num_bytes = hosts.num_bytes()

    def run(delay_s: float) -> Planted:
        rate = round(num_bytes / delay_s) if delay_s else FAST
        with hosts.shaped(rate):
            start_ns = time.monotonic_ns()
            pass_on()
            end_ns = time.monotonic_ns()
            taken_ns = (hosts.num_bytes() - BURST_BYTES) * 10**9 // rate
        ledger = make_ledger(recorded(), start_ns, end_ns)
        return Planted(ledger, [{Row.TRANSFER: taken_ns}] * num_ranks)

    check(run, least_s)


@pytest.mark.parametrize("num_stages", [2, 4])
def test_a_language_models_link(
    hosts: Hosts, language_ranks: tuple[WorkerPool, Plant], num_stages: int
) -> None:
    pool, plant = language_ranks
    plant.set([0] * num_stages)
    params = SamplingParams(temperature=0, max_tokens=1)
    with (
        hosts.holding(plant, num_stages),
        LLM("demo", pipeline_parallel_size=num_stages, pool=pool, transport="distributed") as llm,
    ):
        llm.start().scheduler.max_in_flight = 1
        firsts = count(5)  # of a prompt, so that none is known already

        def pass_on() -> None:
            llm.generate([[next(firsts)] * 100], params)

        check_link(hosts, num_stages, pass_on, llm.recorded)


@pytest.mark.parametrize("num_stages", [2, 4])
def test_a_vision_pipelines_link(
    hosts: Hosts,
    vision_ranks: tuple[WorkerPool, Plant],
    num_stages: int,
    traced: Traced,
) -> None:
    """Of micro-batches that queue before the link, which is slower than all stages."""
    pool, plant = vision_ranks
    plant.set([0] * num_stages)
    counts = micro_batch_sizes(len(traced.blocks), num_stages)
    images = made_up_images(NUM_IMAGES, NETWORK.image_shape)
    ranks = RankSettings(devices=("cpu",) * num_stages, num_threads=1, transport="distributed")
    with (
        hosts.holding(plant, num_stages),
        VisionPipeline.open(NETWORK, traced, counts, images, pool, ranks) as pipeline,
    ):
        check_link(
            hosts, num_stages, lambda: pipeline.run(NUM_IMAGES), pipeline.recorded, least_s=0.1
        )
