"""A model for programs on asyncio: `async for output in llm.generate(...)`. The same engine as `LLM`,
in a thread of its own, for any number of callers at once."""

from __future__ import annotations

import asyncio
import os
import queue
import secrets
import threading
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

from bireme.engine.engine import Engine, Matcher, TokenEvent
from bireme.engine.host import EngineHost, Prompt
from bireme.engine.streams import Opened, PromptStream
from bireme.errors import CapacityError, EngineError, RequestError, UserError
from bireme.outputs import Delta, RequestOutput
from bireme.request import Request
from bireme.sampling_params import SamplingParams

_Command = tuple[Request, Matcher | None] | str | None  # add, abort by id, or close


class _Inbox:
    """Commands for the engine's thread; `wake` is readable while some may be there."""

    def __init__(self) -> None:
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        weakref.finalize(self, _close, self._reader, self._writer)

    @property
    def wake(self) -> int:
        return self._reader

    def put(self, command: _Command) -> None:
        self._commands.put(command)
        with suppress(BlockingIOError):  # full: it is readable already
            os.write(self._writer, b"\0")

    def take(self, *, block: bool) -> Iterator[_Command]:
        """All that are there; waits for one if asked to."""
        with suppress(BlockingIOError):
            os.read(self._reader, 1 << 16)
        try:
            while True:
                yield self._commands.get(block=block)
                block = False
        except queue.Empty:
            return


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


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


class AsyncLLM(EngineHost):
    """`LLM` on asyncio; settings as there. `async with` starts the ranks and ends them.

        async with AsyncLLM("demo") as llm:
            async for output in llm.generate("The with statement", SamplingParams(max_tokens=8)):
                print(output.outputs[0].text)

    Where a rank fails, every caller gets the same RankError.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._commands = _Inbox()
        self._starting = asyncio.Lock()
        self._listeners: dict[str, tuple[_Listener, int]] = {}  # with the choice, by request id
        self._thread: threading.Thread | None = None
        self._error: Exception | None = EngineError(
            "the engine does not run; enter the AsyncLLM first"
        )

    async def __aenter__(self) -> AsyncLLM:
        await self.begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def begin(self) -> None:
        """Starts the ranks and the engine's thread, unless they run."""
        async with self._starting:
            if self._thread is not None:
                return
            engine, loop = await asyncio.to_thread(self.start), asyncio.get_running_loop()
            self._commands = _Inbox()
            self._thread = threading.Thread(
                target=self._serve, args=(engine, loop, self._commands), daemon=True
            )
            self._thread.start()
            self._error = None

    async def aclose(self) -> None:
        """Ends what runs, then the ranks."""
        async with self._starting:
            self._fail(EngineError("the engine was closed"))
            thread, self._thread = self._thread, None
            if thread is not None:
                self._commands.put(None)
                await asyncio.to_thread(thread.join)
            await asyncio.to_thread(self.close)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """All of the answer so far, whenever there is more; the last is `finished`.

        A caller that leaves ends its request. RequestError, or CapacityError where the queue is full.
        """
        opened = await asyncio.to_thread(
            self._open, prompt, sampling_params, request_id, priority, timeout_s
        )
        async with aclosing(self._deltas(opened)) as several:
            async for deltas in several:
                yield deltas[-1].output or opened.stream.output()

    async def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Delta]:
        """Like `generate`, in pieces as they come."""
        opened = await asyncio.to_thread(
            self._open, prompt, sampling_params, request_id, priority, timeout_s
        )
        async with aclosing(self._deltas(opened)) as several:
            async for deltas in several:
                for delta in deltas:
                    yield delta

    async def abort(self, request_id: str) -> None:
        """Ends a request, whoever takes its outputs; they get its last one. Unknown ids are ended
        already."""
        for name, (listener, choice) in list(self._listeners.items()):
            if listener.stream.request_id == request_id:
                self._commands.put(name)
                event = TokenEvent(name, [], "abort", None, time.monotonic())
                self._deliver_one(listener, choice, event)

    # --- on the loop ---------------------------------------------------------------------------

    def _open(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str | None,
        priority: int,
        timeout_s: float | None,
    ) -> Opened:
        if self._error is not None:
            raise self._error
        return self.open(
            0,
            prompt,
            params or SamplingParams(),
            request_id=secrets.token_hex(8) if request_id is None else request_id,
            priority=priority,
            timeout_s=timeout_s,
        )

    async def _deltas(self, opened: Opened) -> AsyncGenerator[list[Delta], None]:
        """All that have come, each time that some have."""
        listener, names = _Listener(opened), [request.request_id for request, _ in opened.requests]
        self._check_room(opened)
        for request, matcher in opened.requests:
            self._listeners[request.request_id] = (listener, request.choice)
            self._commands.put((request, matcher))
        try:
            while not listener.is_finished:
                yield await listener.take()
        finally:
            for name in names:
                if self._listeners.pop(name, None) is not None:
                    self._commands.put(name)

    def _check_room(self, opened: Opened) -> None:
        """Again after the prompt was opened in a thread: the engine may have ended meanwhile."""
        if self._error is not None:
            raise self._error
        name = opened.stream.request_id
        if any(listener.stream.request_id == name for listener, _ in self._listeners.values()):
            raise RequestError(f"request {name} is there already")
        most = self.config.max_num_waiting + self.config.max_num_seqs
        if len(self._listeners) + len(opened.requests) > most:
            raise CapacityError(
                f"{len(self._listeners)} requests of {most} are there; try again later"
            )

    def _deliver(self, events: list[TokenEvent]) -> None:
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
                self._commands.put(event.request_id)

    def _refuse(self, request_id: str, error: Exception) -> None:
        listener, _ = self._listeners.get(request_id, (None, 0))
        if listener is not None:
            listener.deltas.put_nowait(error)

    def _fail(self, error: Exception) -> None:
        self._error = error
        for listener in {listener for listener, _ in self._listeners.values()}:
            listener.deltas.put_nowait(error)
        self._listeners.clear()

    # --- in the engine's thread ----------------------------------------------------------------

    def _serve(self, engine: Engine, loop: asyncio.AbstractEventLoop, inbox: _Inbox) -> None:
        """Until closed or broken: every failure ends all requests and is told to their callers."""

        def tell(call: Callable[..., None], *args: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(call, *args)

        try:
            while self._obey(engine, inbox, tell):
                events = engine.step(inbox.wake)
                if events:
                    tell(self._deliver, events)
            engine.settle()
        except Exception as error:
            tell(self._fail, error)

    def _obey(self, engine: Engine, inbox: _Inbox, tell: Callable[..., None]) -> bool:
        """Does what callers asked for since the last step; waits where there is nothing else to do.
        False once closed."""
        is_idle = not engine.has_unfinished and not engine.scheduler.num_in_flight
        for command in inbox.take(block=is_idle):
            match command:
                case None:
                    return False
                case str(request_id):
                    engine.abort(request_id)
                case (request, matcher):
                    try:
                        engine.add(request, matcher)
                    except UserError as error:
                        tell(self._refuse, request.request_id, error)
        return True
