"""Callers on one asyncio loop who wait for what an engine elsewhere tells of their requests."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from bireme.engine.engine import TokenEvent
from bireme.engine.engine_loop import EngineCommand
from bireme.engine.input_processor import InputProcessor, Prompt
from bireme.engine.streams import Opened, PromptStream
from bireme.errors import CapacityError, EngineError, RequestError
from bireme.outputs import Delta, RequestOutput
from bireme.sampling_params import SamplingParams


class Answers:
    """What comes of prompts that were submitted together: as many deltas as tokens at most wait here.

    Leaving it ends those of its requests that still run.
    """

    def __init__(self, opened: Sequence[Opened], end: Callable[[Sequence[str]], None]) -> None:
        self.streams = [one.stream for one in opened]
        self._names = [request.request_id for one in opened for request, _ in one.requests]
        self._end = end
        self._found: list[Delta | Exception] = []
        self._taker: asyncio.Future[None] | None = None  # waits for the next of them
        self._num_unfinished = len(opened)

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._end(self._names)

    @property
    def is_finished(self) -> bool:
        """True once the last delta was taken."""
        return not self._num_unfinished

    def put(self, item: Delta | Exception) -> None:
        self._found.append(item)
        if self._taker is not None and not self._taker.done():
            self._taker.set_result(None)

    async def take(self) -> list[Delta]:
        """All that have come, at least one; raises what went wrong behind them."""
        if not self._found:
            self._taker = asyncio.get_running_loop().create_future()
            await self._taker
        found, self._found = self._found, []
        deltas: list[Delta] = []
        for index, item in enumerate(found):
            if isinstance(item, Exception):
                if not deltas:
                    raise item
                self._found = found[index:]
                break
            deltas.append(item)
        self._num_unfinished -= sum(delta.output is not None for delta in deltas)
        return deltas


@dataclass(frozen=True, slots=True)
class _Listener:
    """Who waits for one request: a continuation of one of the prompts."""

    answers: Answers
    stream: PromptStream
    choice: int
    num_tokens: int


class Callers:
    """Any number of callers of one engine, whose requests are bounded in number and in prompt tokens.

    `send` takes their commands to the engine, `inputs` makes requests; both are there once `begin`
    was called. `deliver`, `refuse` and `fail` are for what the engine says, on the loop.
    """

    def __init__(self) -> None:
        self._listeners: dict[str, _Listener] = {}  # by request id
        self._names: Counter[str] = Counter()  # as callers gave them, of the same requests
        self._num_tokens = 0  # of their prompts
        self._error: Exception | None = EngineError("the engine does not run yet")
        self.on_failure: Callable[[Exception], None] = lambda _: None

    def begin(
        self,
        inputs: InputProcessor,
        send: Callable[[EngineCommand], None],
        most_requests: int,
        most_tokens: int,
    ) -> None:
        self._inputs, self._send = inputs, send
        self._most_requests, self._most_tokens = most_requests, most_tokens
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
        with self.submit([opened]) as answers:
            while not answers.is_finished:
                deltas = await answers.take()
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
        with self.submit([opened]) as answers:
            while not answers.is_finished:
                for delta in await answers.take():
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

    def submit(self, opened: Sequence[Opened]) -> Answers:
        """Lets prompts wait for their turn, all of them or none; a context manager.

        CapacityError where there is no room for them, RequestError for a name that is in use.
        """
        self._check_room(opened)
        answers = Answers(opened, self._end)
        try:
            for one in opened:
                for request, matcher in one.requests:
                    self._send((request, matcher))
                    num_tokens = len(request.prompt_token_ids)
                    listener = _Listener(answers, one.stream, request.choice, num_tokens)
                    self._listeners[request.request_id] = listener
                    self._names[one.stream.request_id] += 1
                    self._num_tokens += num_tokens
        except BaseException:  # one could not be sent: the others are ended
            answers.close()
            raise
        return answers

    def _end(self, names: Sequence[str]) -> None:
        for name in names:
            if self._drop(name):
                self._send(name)

    def _drop(self, name: str) -> bool:
        """False for a request that was dropped before."""
        listener = self._listeners.pop(name, None)
        if listener is None:
            return False
        self._num_tokens -= listener.num_tokens
        used = listener.stream.request_id
        self._names[used] -= 1
        if not self._names[used]:
            del self._names[used]
        return True

    def check_fits(self, num_requests: int) -> None:
        """RequestError for more than there is ever room for."""
        _check_most(num_requests, "requests", self._most_requests)

    def _check_room(self, opened: Sequence[Opened]) -> None:
        """Of an engine that may have ended since the prompts were opened."""
        if self._error is not None:
            raise self._error
        for name, count in Counter(one.stream.request_id for one in opened).items():
            if name in self._names or count > 1:
                raise RequestError(f"request {name} is there already")
        num_new = sum(len(one.requests) for one in opened)
        num_tokens = sum(len(it.prompt_token_ids) for one in opened for it, _ in one.requests)
        for what, there, new, most in (
            ("requests", len(self._listeners), num_new, self._most_requests),
            ("prompt tokens", self._num_tokens, num_tokens, self._most_tokens),
        ):
            _check_most(new, what, most)
            if there + new > most:
                raise CapacityError(f"{there} {what} of {most} are there; try again later")

    def abort(self, request_id: str) -> None:
        """Ends a request, whoever takes its outputs; they get its last one. Unknown ids are ended
        already."""
        for name, listener in list(self._listeners.items()):
            if listener.stream.request_id == request_id:
                self._send(name)
                event = TokenEvent(name, [], "abort", None, time.monotonic())
                self._deliver_one(listener, event)

    # --- what the engine says ------------------------------------------------------------------

    def deliver(self, events: list[TokenEvent]) -> None:
        for event in events:
            listener = self._listeners.get(event.request_id)
            if listener is None:
                continue
            try:
                self._deliver_one(listener, event)
            except Exception as error:  # of one caller: the others get their tokens
                listener.answers.put(error)

    def _deliver_one(self, listener: _Listener, event: TokenEvent) -> None:
        delta = listener.stream.add(listener.choice, event)
        if delta is None:
            return
        listener.answers.put(delta)
        if delta.finish_reason is not None:
            self._drop(event.request_id)
            if event.finish_reason is None:  # a stop string was found
                self._send(event.request_id)

    def refuse(self, request_id: str, error: Exception) -> None:
        listener = self._listeners.get(request_id)
        if listener is not None:
            listener.answers.put(error)

    def fail(self, error: Exception) -> None:
        """Ends all requests, and refuses new ones."""
        self._error = error
        for answers in {listener.answers for listener in self._listeners.values()}:
            answers.put(error)
        self._listeners.clear()
        self._names.clear()
        self._num_tokens = 0
        self.on_failure(error)


def _check_most(num: int, what: str, most: int) -> None:
    if num > most:
        raise RequestError(f"{num} {what} at once are too many; send at most {most}")
