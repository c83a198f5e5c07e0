"""What a server is at, told about once a second to whoever looks: one producer for all of them.

It works while somebody looks. An event is made once, whatever the number of viewers; one that is slow misses
those that come while it takes another.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from bireme.errors import CapacityError
from bireme.server.sse import sse

MOST_VIEWERS = 16
_EVERY_S = 1.0
_MOST_SHARE = (
    0.25  # of the time for looking: many ranks, or a busy machine, are looked at less often
)
_LONGEST_S = 5.0
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class Live:
    """`look` makes the JSON of one event."""

    def __init__(self, look: Callable[[], Awaitable[bytes]], every_s: float = _EVERY_S) -> None:
        self._look, self._every_s = look, every_s
        self._num_viewers, self._is_over = 0, False
        self._task: asyncio.Task[None] | None = None
        self._next: asyncio.Future[bytes | None] | None = None  # None: there will be no more

    def enter(self) -> None:
        """One more viewer; CapacityError where there are too many."""
        if self._num_viewers >= MOST_VIEWERS:
            raise CapacityError(
                f"{self._num_viewers} viewers look on, of at most {MOST_VIEWERS}; try again later"
            )
        self._num_viewers += 1

    def leave(self) -> None:
        self._num_viewers -= 1

    async def events(self) -> AsyncIterator[bytes]:
        """From the next one on, until the server ends."""
        while not self._is_over:
            event = await asyncio.shield(self._coming())
            if event is None:
                return
            yield event

    def _coming(self) -> asyncio.Future[bytes | None]:
        if self._task is None or self._task.done():
            self._next = asyncio.get_running_loop().create_future()
            self._task = asyncio.create_task(self._tell())
        assert self._next is not None, "the task runs"
        return self._next

    async def _tell(self) -> None:
        loop = asyncio.get_running_loop()
        while self._num_viewers:
            begun_s = loop.time()
            try:
                event = sse(await self._look(), "moment")
            except Exception as error:  # a bug: each stream breaks with it, and says so in the log
                self._publish(error)
                return
            self._publish(event)
            took_s = loop.time() - begun_s
            pause_s = max(self._every_s, min(took_s / _MOST_SHARE, _LONGEST_S)) - took_s
            await asyncio.sleep(max(0.0, pause_s))

    def _publish(self, event: bytes | Exception | None) -> None:
        published, self._next = self._next, asyncio.get_running_loop().create_future()
        if published is None or published.done():
            return
        if isinstance(event, Exception):
            published.set_exception(event)
        else:
            published.set_result(event)

    def close(self) -> None:
        """Ends all streams."""
        self._is_over = True
        if self._task is not None:
            self._task.cancel()
            self._publish(None)


class Viewing(StreamingResponse):
    """One viewer's stream; CapacityError before it begins where there are too many."""

    media_type = "text/event-stream"

    def __init__(self, live: Live) -> None:
        live.enter()
        self._live = live
        super().__init__(live.events(), headers=_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._live.leave()
