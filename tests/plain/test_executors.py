"""Executors without devices: the engine cannot tell, and time is what was said."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest

from bireme.engine.engine import Engine
from bireme.engine.limits import SchedulerLimits
from bireme.engine.scheduler import Scheduler
from bireme.engine.scripted import ScriptedExecutor
from bireme.engine.simulated import SimulatedExecutor, StageWork, VirtualClock
from bireme.engine.streams import PromptStream
from bireme.outputs import RequestMetrics
from bireme.parallel.layout import CacheKind
from bireme.request import Request, ScheduledBatch
from bireme.sampling_params import SamplingParams, StructuredOutputsParams


def limits(pp_size: int, **more: object) -> SchedulerLimits:
    return SchedulerLimits(
        pp_size=pp_size, max_num_seqs=32, max_num_batched_tokens=256, block_size=4, **more
    )  # type: ignore[arg-type]


def request(index: int, max_tokens: int, **more: object) -> Request:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, **more)  # type: ignore[arg-type]
    return Request(
        request_id=str(index), prompt_token_ids=(1, 2, 3), params=params, seed=index,
        eos_token_ids=frozenset({9}),
    )  # fmt: skip


def test_a_script_is_followed_to_its_end_of_text() -> None:
    engine = Engine(
        Scheduler(limits(2), [CacheKind(None, 100)]),
        ScriptedExecutor({0: [5, 6, 7, 9], 1: [8, 4, 4, 4, 4, 4]}),
    )
    got: dict[str, list[int]] = {"0": [], "1": []}
    for event in engine.run([(request(0, 20), None), (request(1, 3), None)]):
        got[event.request_id] += event.token_ids
    assert got == {"0": [5, 6, 7, 9], "1": [8, 4, 4]}


class Counting:
    """A matcher that allows anything and ends after three tokens."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.masks_at: list[int] = []

    def accept(self, token_ids: list[int]) -> None:
        self.seen += token_ids

    def mask(self) -> bytes:
        self.masks_at.append(len(self.seen))
        return b"\xff"

    @property
    def is_stopped(self) -> bool:
        return len(self.seen) == 3


@pytest.mark.parametrize("pp_size", [1, 2, 4])
def test_each_masked_step_gets_its_mask_once_the_tokens_before_are_known(pp_size: int) -> None:
    wanted = StructuredOutputsParams(choice=["a"])
    engine = Engine(
        Scheduler(limits(pp_size), [CacheKind(None, 100)]), ScriptedExecutor({0: [4, 5, 6, 7, 8]})
    )
    matcher = Counting()
    events = list(
        engine.run([(request(0, 9, structured_outputs=wanted), matcher), (request(1, 12), None)])
    )
    assert matcher.seen == [4, 5, 6]
    assert matcher.masks_at[:3] == [0, 1, 2]
    assert [event.finish_reason for event in events if event.request_id == "0"][-1] == "stop"


def test_a_deadline_passes_on_the_clock_of_the_devices() -> None:
    clock = VirtualClock()
    executor = SimulatedExecutor(1, lambda stage, batch: 1.0, clock)
    engine = Engine(Scheduler(limits(1), [CacheKind(None, 100)]), executor, clock)
    late = Request(
        request_id="0", prompt_token_ids=(1,), params=SamplingParams(max_tokens=90), seed=0,
        deadline_s=10.5,
    )  # fmt: skip
    events = list(engine.run([(late, None)]))
    assert events[-1].finish_reason == "timeout"
    assert 10.5 < events[-1].time_s <= 12


def run(num_requests: int, pp_size: int, seconds: float, batches_in_flight: int) -> list[float]:
    """The share of time, stage by stage, in which a stage idles between two steps."""
    clock = VirtualClock()

    def took(_stage: int, batch: ScheduledBatch) -> float:
        return seconds * len(batch.pieces)

    done: list[StageWork] = []
    executor = SimulatedExecutor(pp_size, took, clock, note=done.append)
    plan = Scheduler(limits(pp_size), [CacheKind(None, 2000)])
    plan.max_in_flight = batches_in_flight
    engine = Engine(plan, executor, clock)
    for _ in engine.run([(request(index, 200), None) for index in range(num_requests)]):
        pass
    shares = []
    for stage in range(pp_size):
        work = [item for item in done if item.stage == stage][20:-20]
        idle = sum(after.start_s - before.end_s for before, after in pairwise(work))
        shares.append(idle / (work[-1].end_s - work[0].start_s))
    return shares


@pytest.mark.parametrize("num_requests", [4, 8, 16])
def test_stages_do_not_wait_for_ids(num_requests: int) -> None:
    assert max(run(num_requests, 4, 0.01, 5)) < 0.01


def test_stages_wait_most_of_the_time_with_one_batch_in_flight() -> None:
    assert min(run(8, 4, 0.01, 1)) > 0.7


def metrics_of(engine: Engine, requests: list[Request]) -> dict[str, RequestMetrics]:
    """By request id, as a caller gets them."""
    streams = {
        one.request_id: PromptStream(
            0, one.request_id, None, one.prompt_token_ids, one.params, None, one.arrival_s
        )
        for one in requests
    }
    for event in engine.run([(one, None) for one in requests]):
        streams[event.request_id].add(0, event)
    return {name: metrics_or_fail(stream) for name, stream in streams.items()}


def metrics_or_fail(stream: PromptStream) -> RequestMetrics:
    metrics = stream.output().metrics
    assert metrics is not None
    return metrics


def test_a_request_waits_until_its_first_step_is_scheduled() -> None:
    clock = VirtualClock()
    few = SchedulerLimits(pp_size=1, max_num_seqs=1, max_num_batched_tokens=256, block_size=4)
    engine = Engine(
        Scheduler(few, [CacheKind(None, 100)]), SimulatedExecutor(1, lambda *_: 1.0, clock), clock
    )
    found = metrics_of(engine, [request(0, 4), request(1, 4)])
    assert (found["0"].queue_s, found["0"].ttft_s, found["0"].e2e_s) == (0, 1, 4)
    assert (found["1"].queue_s, found["1"].ttft_s, found["1"].e2e_s) == (4, 5, 8)


def test_a_preempted_request_waited_once() -> None:
    clock = VirtualClock()
    engine = Engine(
        Scheduler(limits(1), [CacheKind(None, 7)]),
        SimulatedExecutor(1, lambda *_: 1.0, clock),
        clock,
    )
    found = metrics_of(engine, [request(0, 18), request(1, 18)])
    assert engine.scheduler.num_preemptions > 0
    assert found["1"].queue_s == 0
    assert found["1"].e2e_s > found["0"].e2e_s


def test_one_that_never_began_waited_for_all_its_time() -> None:
    clock = VirtualClock()
    few = SchedulerLimits(pp_size=1, max_num_seqs=1, max_num_batched_tokens=256, block_size=4)
    engine = Engine(
        Scheduler(few, [CacheKind(None, 100)]), SimulatedExecutor(1, lambda *_: 1.0, clock), clock
    )
    late = dataclasses.replace(request(1, 4), deadline_s=2.5)
    found = metrics_of(engine, [request(0, 9), late])
    assert found["1"].queue_s == found["1"].e2e_s == pytest.approx(3)
