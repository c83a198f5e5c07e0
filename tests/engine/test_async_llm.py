"""`AsyncLLM`: many callers on one engine, each of whom may leave, be late, or be refused."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

import pytest

from bireme import LLM, AsyncLLM, SamplingParams
from bireme.engine import deadline
from bireme.engine.pool import WorkerPool
from bireme.errors import CapacityError, EngineError, RankError, RequestError
from bireme.request import ScheduledBatch

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)


def serve(pool: WorkerPool, use: Callable[[AsyncLLM], Awaitable[None]], **settings: Any) -> None:
    """Runs `use` on an engine of two stages."""

    async def main() -> None:
        settings.setdefault("pipeline_parallel_size", 2)
        async with AsyncLLM("demo", dtype="float32", pool=pool, **settings) as llm:
            await asyncio.wait_for(use(llm), 120)

    asyncio.run(main())


async def answer(llm: AsyncLLM, prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    *_, last = [output async for output in llm.generate(prompt, params)]
    assert last.finished
    return last.outputs[0].token_ids


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.01)


def test_many_callers_get_what_each_would_get_alone(pool: WorkerPool) -> None:
    prompts = [[index + 5, 7, 9] for index in range(12)]
    with LLM("demo", dtype="float32", pool=pool) as llm:
        alone = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]

    async def use(llm: AsyncLLM) -> None:
        together = await asyncio.gather(*[answer(llm, prompt) for prompt in prompts])
        assert list(together) == alone

    serve(pool, use)


def test_outputs_grow_and_deltas_add_up(pool: WorkerPool) -> None:
    async def use(llm: AsyncLLM) -> None:
        outputs = [output async for output in llm.generate("The with statement", GREEDY)]
        texts = [output.outputs[0].text for output in outputs]
        assert all(after.startswith(before) for before, after in pairwise(texts))
        deltas = [delta async for delta in llm.stream("The with statement", GREEDY)]
        assert "".join(delta.text for delta in deltas) == texts[-1]
        assert [delta.finish_reason for delta in deltas][-1] == "length"

    serve(pool, use)


def test_a_caller_that_leaves_frees_its_request(pool: WorkerPool) -> None:
    async def use(llm: AsyncLLM) -> None:
        async for _ in llm.generate([5, 6], LONG):
            break
        task = asyncio.create_task(answer(llm, [5, 7], LONG))
        scheduler = llm.start().scheduler
        await until(lambda: scheduler.num_running > 0)
        task.cancel()
        await until(lambda: not scheduler.has_unfinished)
        assert await answer(llm, [5, 6, 7])

    serve(pool, use)


def test_an_aborted_request_tells_its_caller(pool: WorkerPool) -> None:
    async def use(llm: AsyncLLM) -> None:
        reasons = []
        async for output in llm.generate([5, 6], LONG, "mine"):
            reasons.append(output.outputs[0].finish_reason)
            await llm.abort("mine")
        assert reasons[-1] == "abort"
        assert len(reasons) < 900

    serve(pool, use)


def test_a_deadline_ends_a_request(pool: WorkerPool) -> None:
    async def use(llm: AsyncLLM) -> None:
        *_, last = [output async for output in llm.generate([5], LONG, timeout_s=0.2)]
        assert last.outputs[0].finish_reason == "timeout"

    serve(pool, use)


def test_a_full_queue_a_known_id_and_bad_parameters_are_refused(pool: WorkerPool) -> None:
    async def use(llm: AsyncLLM) -> None:
        tasks = [asyncio.create_task(answer(llm, [5, 6], LONG))]
        await until(lambda: llm.start().scheduler.num_running == 1)
        tasks.append(asyncio.create_task(answer(llm, [5, 7], LONG)))
        await until(lambda: llm.start().scheduler.num_waiting == 1)
        with pytest.raises(CapacityError, match="2 requests of 2 are there"):
            await answer(llm, [5])
        with pytest.raises(RequestError, match="ids go from 0"):
            await answer(llm, [5, 10**6])
        with pytest.raises(RequestError, match="logit_bias"):
            await answer(llm, [5], SamplingParams(logit_bias={10**6: 1.0}))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: not llm.start().scheduler.has_unfinished)

    serve(pool, use, max_num_seqs=1, max_num_waiting=1)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"priority": 10**400}, "priority=1000"),
        ({"priority": 1.5}, "priority=1.5 must be a whole number"),
        ({"timeout_s": float("nan")}, "timeout_s=nan must be a number"),
        ({"timeout_s": -1}, "timeout_s=-1 must be a number of seconds, at least 0"),
        ({"request_id": 5}, "request_id=5 must be a text"),
        (
            {"sampling_params": SamplingParams(stop_token_ids=(2**70,), min_tokens=1)},
            "stop_token_ids",
        ),
        ({"sampling_params": SamplingParams(stop_token_ids=(-1,))}, "ids go from 0 to 2047"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused_and_harms_nobody(
    pool: WorkerPool, asked: dict[str, Any], says: str
) -> None:
    async def use(llm: AsyncLLM) -> None:
        other = asyncio.create_task(answer(llm, [5, 6]))
        with pytest.raises(RequestError, match=says):
            async for _ in llm.generate([5], **asked):
                pass
        assert len(await other) == 20

    serve(pool, use)


def test_a_rank_that_is_killed_ends_every_request_with_its_name(pool: WorkerPool) -> None:
    async def use(llm: AsyncLLM) -> None:
        tasks = [asyncio.create_task(answer(llm, [5, index], LONG)) for index in range(4)]
        await until(lambda: llm.start().scheduler.num_running == 4)
        victim = pool.take(2)[1]
        os.kill(victim.process.pid, signal.SIGKILL)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, RankError) for result in results), results
        assert {str(result) for result in results} == {
            "rank 1 (stage 1, tp 0): its process was killed by signal 9"
        }
        with pytest.raises(RankError):
            await answer(llm, [5])

    serve(pool, use)


def test_a_rank_that_is_killed_while_the_engine_is_idle_is_known_without_any_request(
    pool: WorkerPool,
) -> None:
    async def use(llm: AsyncLLM) -> None:
        await answer(llm, [5, 6])
        os.kill(pool.take(2)[1].process.pid, signal.SIGKILL)
        await until(lambda: llm._callers.error is not None)
        assert isinstance(llm._callers.error, RankError)
        assert str(llm._callers.error).startswith("rank 1 (stage 1, tp 0): its process was killed")

    serve(pool, use)


def test_callers_wait_for_a_stopped_rank_as_long_as_the_deadline_says_and_no_longer(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine looks at its inbox meanwhile; that does not make it begin to wait anew."""
    monkeypatch.setattr(deadline, "LEAST_S", 6.0)

    async def use(llm: AsyncLLM) -> None:
        await answer(llm, [5, 6])
        task = asyncio.create_task(answer(llm, [5, 6], LONG))
        await until(lambda: llm.start().scheduler.num_running == 1)
        os.kill(pool.take(2)[1].process.pid, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(RankError, match="its process is stopped"):
            await task
        assert time.monotonic() - start < 10

    serve(pool, use)


def test_a_burst_of_callers_finds_all_seats_of_an_idle_engine(pool: WorkerPool) -> None:
    async def use(llm: AsyncLLM) -> None:
        answers = await asyncio.gather(*[answer(llm, [5, index]) for index in range(5)])
        assert [len(ids) for ids in answers] == [20] * 5

    serve(pool, use, max_num_seqs=4, max_num_waiting=1)


def test_without_ranks_nothing_is_served() -> None:
    async def use() -> None:
        with pytest.raises(EngineError, match="does not run"):
            await answer(AsyncLLM("demo"), [5])

    asyncio.run(use())


def test_stop_strings_end_a_request_and_do_not_show(pool: WorkerPool) -> None:
    async def use(llm: AsyncLLM) -> None:
        *_, whole = [output async for output in llm.generate("The with statement", GREEDY)]
        text = whole.outputs[0].text
        stop = text[8:14]
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop=[stop])
        outputs = [output async for output in llm.generate("The with statement", params)]
        last = outputs[-1].outputs[0]
        assert (last.finish_reason, last.stop_reason) == ("stop", stop)
        assert last.text == text[: text.index(stop)]
        assert all(text.startswith(output.outputs[0].text) for output in outputs)
        await until(lambda: not llm.start().scheduler.has_unfinished)

    serve(pool, use)


def test_a_new_request_is_scheduled_while_a_step_of_another_is_in_flight(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only when its output has come: there is room for another batch."""

    async def use(llm: AsyncLLM) -> None:
        scheduler, executor = llm.start().scheduler, llm.executor
        submit = executor.submit
        first_seen = asyncio.Event()
        loop, in_flight = asyncio.get_running_loop(), []

        def submitting(batch: ScheduledBatch) -> None:
            in_flight.append(scheduler.num_in_flight)
            submit(batch)
            loop.call_soon_threadsafe(first_seen.set)

        monkeypatch.setattr(executor, "submit", submitting)
        stopped = pool.take(2)[1].process.pid
        os.kill(stopped, signal.SIGSTOP)  # nothing is answered from here on
        try:
            first = asyncio.create_task(answer(llm, [5, 6]))
            await first_seen.wait()
            second = asyncio.create_task(answer(llm, [7, 8]))
            await until(lambda: len(in_flight) > 1)
        finally:
            os.kill(stopped, signal.SIGCONT)
        await asyncio.gather(first, second)
        assert in_flight[:2] == [1, 2]

    serve(pool, use)


def test_a_name_that_is_used_again_gets_nothing_of_the_request_before(pool: WorkerPool) -> None:
    async def use(llm: AsyncLLM) -> None:
        alone = await answer(llm, [5, 6])
        async for _ in llm.generate([7, 8], LONG, "mine"):
            break
        *_, last = [output async for output in llm.generate([5, 6], GREEDY, "mine")]
        assert last.outputs[0].token_ids == alone
        assert last.request_id == "mine"

    serve(pool, use)


def test_a_slow_caller_sees_the_end_once(pool: WorkerPool) -> None:
    async def use(llm: AsyncLLM) -> None:
        finished = []
        async for output in llm.generate([5, 6], GREEDY):
            finished.append(output.finished)
            await until(lambda: not llm.start().scheduler.has_unfinished)
        assert finished == [False, True]

    serve(pool, use)


def test_a_prompt_that_is_opened_while_the_engine_is_closed_is_refused(pool: WorkerPool) -> None:
    async def main() -> None:
        llm = AsyncLLM("demo", dtype="float32", pool=pool)
        await asyncio.gather(llm.begin(), llm.begin())
        opened = await llm._callers.open([5, 6], GREEDY)
        await llm.aclose()
        with pytest.raises(EngineError, match="was closed"):
            llm._callers.submit([opened])
        async with llm:
            assert await answer(llm, [5, 6])

    asyncio.run(main())
