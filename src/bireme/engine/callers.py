"""Callers on one asyncio loop who wait for what an engine elsewhere tells of their requests."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from bireme.engine.engine import TokenEvent
from bireme.engine.engine_loop import EngineCommand
from bireme.engine.input_processor import InputProcessor, Prompt
from bireme.engine.streams import Opened, PromptStream
from bireme.errors import CapacityError, EngineError, RequestError
from bireme.outputs import Delta, RequestOutput
from bireme.sampling_params import SamplingParams


@dataclass(eq=False)
class _Listener:
    """A caller that waits for a prompt's deltas, of which there are at most as many as tokens."""

    opened: Opened
    deltas: asyncio.Queue[Delta | Exception] = field(default_factory=asyncio.Queue)

    is_finished: bool = False

    @property
    def stream(self) -> PromptStream:
        return self.opened.stream

    async def take(self) -> list[Delta]:
        """All that have come, at least one; raises what went wrong behind them."""
        found = [await self.deltas.get()]
        while not self.deltas.empty() and not isinstance(found[-1], Exception):
            found.append(self.deltas.get_nowait())
        if isinstance(found[-1], Exception):
            if len(found) == 1:
                raise found[-1]
            self.deltas.put_nowait(found.pop())
        deltas = [item for item in found if isinstance(item, Delta)]
        self.is_finished = deltas[-1].output is not None
        return deltas


class Callers:
    """Any number of callers of one engine, of whose requests at most `most` are there at once.

    `send` takes their commands to the engine, `inputs` makes requests; both are there once `begin`
    was called. `deliver`, `refuse` and `fail` are for what the engine says, on the loop.
    """

    def __init__(self) -> None:
        self._listeners: dict[str, tuple[_Listener, int]] = {}  # with the choice, by request id
        self._error: Exception | None = EngineError("the engine does not run yet")

    def begin(
        self, inputs: InputProcessor, send: Callable[[EngineCommand], None], most: int
    ) -> None:
        self._inputs, self._send, self._most = inputs, send, most
        self._error = None

    @property
    def error(self) -> Exception | None:
        """Why no request can be taken; None while they can."""
        return self._error

    @property
    def num_requests(self) -> int:
        return len(self._listeners)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """All of the answer so far, whenever there is more; the last is `finished`.

        A caller that leaves ends its request. RequestError, or CapacityError where the queue is full.
        """
        opened = await self.open(prompt, params, request_id, priority=priority, timeout_s=timeout_s)
        async with aclosing(self.deltas(opened)) as several:
            async for deltas in several:
                yield deltas[-1].output or opened.stream.output()

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Delta]:
        """Like `generate`, in pieces as they come."""
        opened = await self.open(prompt, params, request_id, priority=priority, timeout_s=timeout_s)
        async with aclosing(self.deltas(opened)) as several:
            async for deltas in several:
                for delta in deltas:
                    yield delta

    async def open(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> Opened:
        """Checks what is asked, in a thread; RequestError before it reaches the engine."""
        if self._error is not None:
            raise self._error
        return await asyncio.to_thread(
            self._inputs.open,
            0,
            prompt,
            params or SamplingParams(),
            request_id=secrets.token_hex(8) if request_id is None else request_id,
            priority=priority,
            timeout_s=timeout_s,
        )

    async def deltas(self, opened: Opened) -> AsyncGenerator[list[Delta], None]:
        """All that have come, each time that some have."""
        listener, names = _Listener(opened), [request.request_id for request, _ in opened.requests]
        self._check_room(opened)
        for request, matcher in opened.requests:
            self._listeners[request.request_id] = (listener, request.choice)
            self._send((request, matcher))
        try:
            while not listener.is_finished:
                yield await listener.take()
        finally:
            for name in names:
                if self._listeners.pop(name, None) is not None:
                    self._send(name)

    def _check_room(self, opened: Opened) -> None:
        """Again after the prompt was opened in a thread: the engine may have ended meanwhile."""
        if self._error is not None:
            raise self._error
        name = opened.stream.request_id
        if any(listener.stream.request_id == name for listener, _ in self._listeners.values()):
            raise RequestError(f"request {name} is there already")
        if len(self._listeners) + len(opened.requests) > self._most:
            raise CapacityError(
                f"{len(self._listeners)} requests of {self._most} are there; try again later"
            )

    def abort(self, request_id: str) -> None:
        """Ends a request, whoever takes its outputs; they get its last one. Unknown ids are ended
        already."""
        for name, (listener, choice) in list(self._listeners.items()):
            if listener.stream.request_id == request_id:
                self._send(name)
                event = TokenEvent(name, [], "abort", None, time.monotonic())
                self._deliver_one(listener, choice, event)

    # --- what the engine says ------------------------------------------------------------------

    def deliver(self, events: list[TokenEvent]) -> None:
        for event in events:
            listener, choice = self._listeners.get(event.request_id, (None, 0))
            if listener is None:
                continue
            try:
                self._deliver_one(listener, choice, event)
            except Exception as error:  # of one caller: the others get their tokens
                listener.deltas.put_nowait(error)

    def _deliver_one(self, listener: _Listener, choice: int, event: TokenEvent) -> None:
        delta = listener.stream.add(choice, event)
        if delta is None:
            return
        listener.deltas.put_nowait(delta)
        if delta.finish_reason is not None:
            del self._listeners[event.request_id]
            if event.finish_reason is None:  # a stop string was found
                self._send(event.request_id)

    def refuse(self, request_id: str, error: Exception) -> None:
        listener, _ = self._listeners.get(request_id, (None, 0))
        if listener is not None:
            listener.deltas.put_nowait(error)

    def fail(self, error: Exception) -> None:
        """Ends all requests, and refuses new ones."""
        self._error = error
        for listener in {listener for listener, _ in self._listeners.values()}:
            listener.deltas.put_nowait(error)
        self._listeners.clear()
