"""Sends requests, in an open or a closed loop, and keeps what came of each.

An open loop sends by absolute time, whether answers come or not. A closed loop keeps so many requests
on their way and sends the next when one has ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass

from bireme.bench.answer import Answer, Sent

_TICK_S = 0.001
Send = Callable[[], Awaitable[Answer]]
Prepare = Callable[[int], Send]  # makes the request of an index ready; calling the result sends it


@dataclass
class Progress:
    """Counts that grow while a load runs."""

    num_done: int = 0
    num_failed: int = 0
    num_in_flight: int = 0
    num_pieces: int = 0  # of answers; about a token each


@dataclass(frozen=True)
class LoadResult:
    """Requests in the order in which they ended. `num_unfinished` were on their way when the load was
    stopped; `cpu_share` is what this process used of one core."""

    sent: list[Sent]
    duration_s: float
    cpu_share: float
    num_unfinished: int = 0
    was_stopped: bool = False


class Load:
    """Runs once. `prepare` is called shortly before its request is due; `progress` may be read
    meanwhile."""

    def __init__(self, prepare: Prepare, num_requests: int, progress: Progress) -> None:
        self.progress = progress
        self._prepare, self._num_requests = prepare, num_requests
        self._sent: list[Sent] = []
        self._start_s = 0.0

    async def run(
        self, offsets: Iterable[float] | None, max_concurrency: int | None, stop: asyncio.Event
    ) -> LoadResult:
        """An open loop by `offsets`, seconds after now; a closed one of `max_concurrency` without
        them. `stop` ends it with what there is."""
        self._start_s, cpu_s = time.perf_counter(), time.process_time()
        if offsets is None:
            assert max_concurrency is not None
            was_stopped = await _until(stop, self._closed(max_concurrency))
        else:
            was_stopped = await _until(stop, self._open(offsets, max_concurrency))
        duration_s = time.perf_counter() - self._start_s
        return LoadResult(
            self._sent,
            duration_s,
            (time.process_time() - cpu_s) / duration_s,
            self.progress.num_in_flight,
            was_stopped,
        )

    async def _open(self, offsets: Iterable[float], max_concurrency: int | None) -> None:
        places = asyncio.Semaphore(max_concurrency) if max_concurrency else nullcontext()
        async with asyncio.TaskGroup() as tasks:
            for index, offset in zip(range(self._num_requests), offsets, strict=False):
                send = self._prepare(index)
                await _at(self._start_s + offset)
                tasks.create_task(self._send(index, send, self._start_s + offset, places))

    async def _closed(self, concurrency: int) -> None:
        indices = iter(range(self._num_requests))
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(concurrency, self._num_requests)):
                tasks.create_task(self._one_after_another(indices))

    async def _one_after_another(self, indices: Iterator[int]) -> None:
        for index in indices:
            await self._send(index, self._prepare(index), None, nullcontext())

    async def _send(
        self,
        index: int,
        send: Send,
        due_s: float | None,
        places: AbstractAsyncContextManager[None],
    ) -> None:
        ready_s = time.perf_counter()
        async with places:
            sent_s = time.perf_counter()
            self.progress.num_in_flight += 1
            answer = await send()  # where it is cancelled, the request stays in flight: unfinished
            self.progress.num_in_flight -= 1
        self.progress.num_done += 1
        self.progress.num_failed += bool(answer.error)
        lag_s = 0.0 if due_s is None else ready_s - due_s
        self._sent.append(Sent(index, sent_s - self._start_s, lag_s, sent_s - ready_s, answer))


async def _at(time_s: float) -> None:
    """Never too soon, though loops count in milliseconds; gives way once at least, so that what is due
    is sent."""
    await asyncio.sleep(max(0.0, time_s - time.perf_counter()))
    while time.perf_counter() < time_s:
        await asyncio.sleep(_TICK_S)


async def _until(stop: asyncio.Event, work: Awaitable[None]) -> bool:
    """True if `stop` came before the end of the work, which is then cancelled."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
            return False
        return True
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
