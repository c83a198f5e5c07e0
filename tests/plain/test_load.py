"""Open and closed loops, with requests that end when they are let."""

from __future__ import annotations

import asyncio

import pytest

from bireme.bench.answer import Answer
from bireme.bench.load import Load, LoadResult, Progress, Send


class Requests:
    """Requests that end when they are let; counts how many are open."""

    def __init__(self) -> None:
        self.prepared: list[int] = []
        self.num_open = self.most_open = self.num_begun = 0
        self.may_end = asyncio.Event()
        self.all_begun = asyncio.Event()

    def prepare(self, index: int) -> Send:
        self.prepared.append(index)
        return self.send

    async def send(self) -> Answer:
        self.num_begun += 1
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        if self.num_begun == 5:
            self.all_begun.set()
        await self.may_end.wait()
        for _ in range(10):  # turns of the loop, in which others may begin
            await asyncio.sleep(0)
        self.num_open -= 1
        return Answer(num_input_tokens=1, num_output_tokens=1)


def test_an_open_loop_goes_on_sending_although_no_answer_comes() -> None:
    async def scenario() -> LoadResult:
        requests = Requests()
        load = Load(requests.prepare, 5, Progress())
        running = asyncio.create_task(load.run([0, 0, 0.001, 0.002, 0.002], None, asyncio.Event()))
        await requests.all_begun.wait()
        assert load.progress.num_in_flight == 5
        requests.may_end.set()
        return await running

    result = asyncio.run(scenario())
    assert [one.index for one in result.sent] == [0, 1, 2, 3, 4]
    assert all(one.lag_s >= 0 for one in result.sent)
    assert not result.was_stopped


@pytest.mark.parametrize("offsets", [None, [0.0] * 20])
def test_no_more_than_the_concurrency_are_on_their_way(offsets: list[float] | None) -> None:
    async def scenario() -> tuple[Requests, LoadResult]:
        requests = Requests()
        requests.may_end.set()
        load = Load(requests.prepare, 20, Progress())
        return requests, await load.run(offsets, 3, asyncio.Event())

    requests, result = asyncio.run(scenario())
    assert requests.most_open == 3
    assert sorted(one.index for one in result.sent) == requests.prepared == list(range(20))


def test_a_load_that_is_stopped_keeps_what_it_has() -> None:
    async def scenario() -> LoadResult:
        requests, stop = Requests(), asyncio.Event()
        load = Load(requests.prepare, 100, Progress())
        running = asyncio.create_task(load.run(None, 5, stop))
        await requests.all_begun.wait()
        stop.set()
        return await running

    result = asyncio.run(scenario())
    assert (len(result.sent), result.num_unfinished, result.was_stopped) == (0, 5, True)
