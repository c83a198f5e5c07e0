"""The engine's loop, on an executor that is a script."""

from __future__ import annotations

import gc
import signal
from collections import deque
from collections.abc import Callable
from itertools import pairwise

import pytest

from bireme.engine.engine import Engine
from bireme.engine.limits import SchedulerLimits
from bireme.engine.scheduler import Scheduler
from bireme.engine.scripted import ScriptedExecutor
from bireme.errors import EngineError
from bireme.parallel.layout import CacheKind
from bireme.request import Executor, Request, ScheduledBatch, StepMasks, StepOutput
from bireme.sampling_params import SamplingParams, StructuredOutputsParams
from bireme.trace import SpanKind, SpanRing


class Scripted:
    """Answers every slot with token 7; calls `at_collect` in the middle of collecting."""

    is_broken = False

    def __init__(self, at_collect: Callable[[], None] = lambda: None) -> None:
        self.in_flight: deque[ScheduledBatch] = deque()
        self.at_collect = at_collect

    def submit(self, batch: ScheduledBatch) -> None:
        self.in_flight.append(batch)

    def give_masks(self, masks: StepMasks) -> None:
        raise AssertionError("nothing is masked here")

    def give_up(self) -> None:
        pass

    def wait(self, wake: int) -> bool:
        return True

    def collect(self) -> StepOutput:
        self.at_collect()
        batch = self.in_flight.popleft()
        slots = batch.sampling_slots
        return StepOutput(batch.incarnation, batch.step_id, slots, [[7]] * len(slots))


def engine(executor: Executor, spans: SpanRing | None = None) -> Engine:
    limits = SchedulerLimits(pp_size=2, max_num_seqs=4, max_num_batched_tokens=16, block_size=4)
    return Engine(Scheduler(limits, [CacheKind(None, 40)]), executor, spans=spans)


def request(name: str, structure: StructuredOutputsParams | None = None) -> Request:
    params = SamplingParams(temperature=0, max_tokens=6, structured_outputs=structure)
    return Request(request_id=name, prompt_token_ids=(1, 2), params=params, seed=0)


def test_an_interrupt_amid_a_step_waits_for_its_end_and_leaves_a_usable_engine() -> None:
    def once() -> None:
        executor.at_collect = lambda: None
        signal.raise_signal(signal.SIGINT)

    executor = Scripted(once)
    loop = engine(executor)
    with pytest.raises(KeyboardInterrupt):
        next(loop.run([(request("a"), None), (request("b"), None)]))
    assert not executor.in_flight
    tokens = [id_ for event in loop.run([(request("c"), None)]) for id_ in event.token_ids]
    assert tokens == [7] * 6


def test_between_two_runs_there_is_no_request() -> None:
    """From when the last step of the one was collected until the other begins."""
    ring = SpanRing.create(256)
    loop = engine(Scripted(), ring)
    for name in ("a", "b"):
        list(loop.run([(request(name), None)]))
    told = ring.read()
    ring.close()
    assert all(one.end_ns == other.start_ns for one, other in pairwise(told))
    spans = [span for span in told if span.kind is not SpanKind.WORK]
    kinds = [span.kind for span in spans]
    assert kinds.count(SpanKind.EMPTY) == 2
    index = kinds.index(SpanKind.EMPTY, 1)
    before, empty, after = spans[index - 1 : index + 2]
    assert (before.kind, after.kind) == (SpanKind.WAIT, SpanKind.SUBMIT)
    assert before.end_ns <= empty.start_ns <= empty.end_ns <= after.start_ns


def test_collections_leave_out_what_is_old_while_a_run_goes_on() -> None:
    loop = engine(Scripted())
    held = loop.run([(request("a"), None)])
    assert [gc.get_freeze_count() > 0 for _ in held] == [False] + 5 * [True]
    assert not gc.get_freeze_count()


def test_what_a_program_left_out_of_collections_itself_stays_so() -> None:
    gc.freeze()
    try:
        list(engine(Scripted()).run([(request("a"), None)]))
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()


def test_an_interrupt_in_the_callers_own_code_is_not_held_back() -> None:
    executor = Scripted()
    loop = engine(executor)
    held = loop.run([(request("a"), None)])
    next(held)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    held.close()  # type: ignore[attr-defined]
    assert not executor.in_flight
    assert len(list(loop.run([(request("b"), None)]))) == 6


def test_a_second_interrupt_does_not_wait() -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    executor = Scripted(twice)
    with pytest.raises(KeyboardInterrupt):
        next(engine(executor).run([(request("a"), None)]))


class Failing:
    """A matcher that takes one token and breaks at the second."""

    is_stopped = False
    num_taken = 0

    def accept(self, token_ids: list[int]) -> None:
        self.num_taken += len(token_ids)
        if self.num_taken > 1:
            raise EngineError("too many states")

    def mask(self) -> bytes:
        return b"\xff"


def test_a_grammar_that_breaks_ends_its_own_request_alone() -> None:
    loop = engine(ScriptedExecutor({0: [7] * 6}))
    structured = request("bad", StructuredOutputsParams(regex="x"))
    last, tokens = {}, {"bad": 0, "good": 0}
    for event in loop.run([(structured, Failing()), (request("good"), None)]):
        last[event.request_id] = event
        tokens[event.request_id] += len(event.token_ids)
    assert tokens == {"bad": 1, "good": 6}
    assert (last["bad"].finish_reason, last["bad"].stop_reason) == ("error", "too many states")
    assert last["good"].finish_reason == "length"
