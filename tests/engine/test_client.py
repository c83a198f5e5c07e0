"""The engine in a process of its own: the same answers, and nobody is left behind or left waiting."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from bireme import LLM, SamplingParams, StructuredOutputsParams
from bireme.config import EngineConfig, ParallelConfig
from bireme.engine.client import EngineClient, EngineProcess
from bireme.engine.pool import WorkerPool
from bireme.engine.rank_stats import RankStats
from bireme.errors import CapacityError, CheckpointError, EngineError, RankError, RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=1)
LONG = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)


@asynccontextmanager
async def running(
    model: str = "demo", *, ask_s: float = 5.0, **settings: Any
) -> AsyncIterator[EngineClient]:
    config = EngineConfig(dtype="float32", device="cpu", **settings)
    client = EngineClient(EngineProcess(model, config), ask_s=ask_s)
    await client.begin()
    try:
        yield client
    finally:
        await client.aclose()


def use(work: Callable[[EngineClient], Awaitable[None]], **settings: Any) -> None:
    async def main() -> None:
        async with running(**settings) as client:
            await asyncio.wait_for(client.ready, 120)
            await asyncio.wait_for(work(client), 120)

    asyncio.run(main())


async def answer(client: EngineClient, prompt: Any, params: SamplingParams = GREEDY) -> Any:
    *_, last = [output async for output in client.callers.generate(prompt, params)]
    return last.outputs[0]


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.01)


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_answers_as_an_engine_in_this_process_does(pool: WorkerPool) -> None:
    prompts = [[index + 5, 7, 9] for index in range(6)]
    with LLM("demo", dtype="float32", pool=pool) as llm:
        expected = [output.outputs[0] for output in llm.generate(prompts, GREEDY)]

    async def work(client: EngineClient) -> None:
        found = await asyncio.gather(*[answer(client, prompt) for prompt in prompts])
        assert [one.token_ids for one in found] == [one.token_ids for one in expected]
        assert [one.text for one in found] == [one.text for one in expected]
        assert found[0].logprobs is not None
        structure = StructuredOutputsParams(json={"enum": ["red", "green"]})
        params = SamplingParams(max_tokens=30, structured_outputs=structure)
        assert json.loads((await answer(client, "A colour:", params)).text) in ["red", "green"]
        stats = await client.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.prefix_queries_total > 0
        check_ranks(stats.ranks)

    use(work, parallel=ParallelConfig.of(1, 2))


def check_ranks(ranks: list[RankStats]) -> None:
    """Of two stages of one rank that made steps."""
    first, last = ranks
    assert [(rank.stage, rank.rank) for rank in ranks] == [(0, 0), (1, 1)]
    for rank in ranks:
        assert rank.num_steps_total > 0
        assert rank.busy_s > 0
        assert rank.memory.weight_bytes > 0
        assert rank.memory.cache_bytes > 0
        assert rank.collective_bytes == 0
    assert first.sent_bytes >= last.received_bytes > 0  # hidden states
    assert last.sent_bytes >= first.received_bytes > 0  # ids, of which some are not needed yet


def test_a_caller_that_leaves_frees_its_request_and_bad_ones_are_refused() -> None:
    async def work(client: EngineClient) -> None:
        tasks = [asyncio.create_task(answer(client, [5, 6], LONG))]
        while not (await client.stats()).num_running:
            pass
        tasks.append(asyncio.create_task(answer(client, [5, 7], LONG)))
        while not (await client.stats()).num_waiting:
            pass
        with pytest.raises(CapacityError, match="2 requests of 2"):
            await answer(client, [5, 7], LONG)
        with pytest.raises(RequestError, match="ids go from 0"):
            await answer(client, [10**6])
        for task in tasks:
            task.cancel()
        while (await client.stats()).num_running:
            pass
        assert (await answer(client, [5, 6])).token_ids

    use(work, max_num_seqs=1, max_num_waiting=1)


def test_a_request_that_cannot_be_understood_ends_all_with_an_error() -> None:
    async def work(client: EngineClient) -> None:
        params = SamplingParams(max_tokens=4)
        object.__setattr__(params, "stop_token_ids", {1: 2})
        with pytest.raises(EngineError, match="stop_token_ids"):
            await answer(client, [5, 6], params)

    use(work)


def test_a_request_that_cannot_be_sent_takes_no_place() -> None:
    async def work(client: EngineClient) -> None:
        for _ in range(3):
            params = SamplingParams(max_tokens=1)
            object.__setattr__(params, "seed", 10**30)
            with pytest.raises(OverflowError):
                await answer(client, [5, 6], params)
        assert client.callers.num_requests == 0
        assert (await answer(client, [5, 6])).token_ids

    use(work, max_num_seqs=1, max_num_waiting=1)


def test_an_engine_process_that_is_stopped_ends_every_stream() -> None:
    async def work(client: EngineClient) -> None:
        engine = client._process.process.pid
        stream = client.callers.stream([5, 6], LONG)
        await anext(stream)
        os.kill(engine, signal.SIGSTOP)
        with pytest.raises(EngineError, match="has not answered for 3 s"):
            async for _ in stream:
                pass

    use(work, ask_s=1.0)


def test_prompts_are_bounded_by_their_tokens_too() -> None:
    async def work(client: EngineClient) -> None:
        with pytest.raises(RequestError, match="1800 prompt tokens at once are too many; send at"):
            await answer(client, [5] * 600, SamplingParams(max_tokens=400, n=3))
        stream = client.callers.stream([5] * 600, SamplingParams(max_tokens=400, ignore_eos=True))
        await anext(stream)
        with pytest.raises(CapacityError, match="600 prompt tokens of 1024 are there"):
            await answer(client, [5] * 500, SamplingParams(max_tokens=4))
        await stream.aclose()
        assert (await answer(client, [5] * 500, SamplingParams(max_tokens=4))).token_ids

    use(work, max_num_seqs=1, max_num_waiting_tokens=0)


def test_a_rank_that_is_killed_while_the_engine_is_idle_is_known_without_any_request() -> None:
    async def work(client: EngineClient) -> None:
        ranks = children(client._process.process.pid)
        os.kill(ranks[0], signal.SIGKILL)
        await until(lambda: client.callers.error is not None)
        assert isinstance(client.callers.error, RankError)
        assert "killed by signal 9" in str(client.callers.error)

    use(work, parallel=ParallelConfig.of(1, 2))


def test_what_cannot_start_says_why() -> None:
    async def main() -> None:
        async with running("/nowhere") as client:
            with pytest.raises(CheckpointError, match="/nowhere"):
                await asyncio.wait_for(client.ready, 60)

    asyncio.run(main())


@pytest.mark.parametrize("victim", ["rank", "engine"])
def test_a_killed_rank_or_engine_ends_every_stream_with_its_name(victim: str) -> None:
    async def work(client: EngineClient) -> None:
        engine = client._process.process.pid
        ranks = children(engine)
        assert len(ranks) == 2
        stream = client.callers.stream([5, 6], LONG)
        await anext(stream)
        os.kill(ranks[1] if victim == "rank" else engine, signal.SIGKILL)
        error, named = (RankError, "tp 1") if victim == "rank" else (EngineError, "signal 9")
        with pytest.raises(error, match=named):
            async for _ in stream:
                pass
        with pytest.raises(error, match=named):
            await answer(client, [5, 6])
        await until(lambda: not any(map(is_there, ranks)))

    use(work, parallel=ParallelConfig.of(2))
