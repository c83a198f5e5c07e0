"""The prompts of one HTTP request on their way through the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

import msgspec
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from bireme.engine.callers import Answers
from bireme.engine.input_processor import Prompt
from bireme.engine.streams import Opened
from bireme.errors import BiremeError, RequestError, UserError
from bireme.outputs import Delta, RequestOutput
from bireme.sampling_params import SamplingParams
from bireme.server.errors import ApiError
from bireme.server.exchange import Exchange
from bireme.server.finished import FinishedRequest
from bireme.server.leaving import unless_gone
from bireme.server.protocol.common import SamplingFields, Usage
from bireme.server.protocol.responses import ResponsesRequest
from bireme.server.serving import Serving

_SSE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Reply(Protocol):
    """Turns deltas to what one route sends: a piece at a time as server-sent events, or whole."""

    def begin(self, answers: Answers) -> bytes: ...

    def add(self, delta: Delta, usage: Callable[[], Usage]) -> bytes:
        """`usage` so far, for those who tell it with every piece."""
        ...

    def end(self, usage: Usage) -> bytes: ...

    def failed(self, error: ApiError) -> bytes:
        """Ends a stream that has begun."""
        ...

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> bytes: ...


class Generation:
    """One request's answers as they come, and their count."""

    def __init__(self, serving: Serving, exchange: Exchange, opened: Sequence[Opened]) -> None:
        self._serving, self._exchange, self._opened = serving, exchange, opened
        self.answers = serving.client.callers.submit(opened)
        self._outputs: dict[int, RequestOutput] = {}
        self._error: RequestError | None = None  # to be raised behind what came before it
        self._is_refused = False
        streams = self.answers.streams
        exchange.num_prompt_tokens = sum(one.num_prompt_tokens for one in streams)
        metrics = serving.metrics
        self._watches = [metrics.begin(one.num_prompt_tokens, one.arrival_s) for one in streams]

    @property
    def outputs(self) -> list[RequestOutput]:
        """One a prompt, once all have ended."""
        return [self._outputs[index] for index in range(len(self._opened))]

    def usage(self) -> Usage:
        """So far."""
        exchange = self._exchange
        exchange.num_cached_tokens = sum(it.num_cached_tokens for it in self.answers.streams)
        return Usage.of(exchange.num_prompt_tokens, exchange.num_tokens, exchange.num_cached_tokens)

    @property
    def is_finished(self) -> bool:
        """True once there is nothing more to take."""
        return self.answers.is_finished and self._error is None

    async def take(self) -> list[Delta]:
        """What has come; then RequestError where a grammar ended a request."""
        found: list[Delta] = []
        if self._error is None:
            for delta in await self.answers.take():
                self._note(delta)
                if delta.finish_reason == "error":
                    self._error = RequestError(str(delta.stop_reason))
                else:
                    found.append(delta)
        if self._error is not None and not found:
            raise self._error
        return found

    def close(self) -> None:
        """Ends what still runs: its client has left, or it failed. What was refused never ran."""
        self.answers.close()
        if self._is_refused:
            return
        error = self._exchange.error
        reason = "abort" if error is None else "error"
        for index, stream in enumerate(self.answers.streams):
            if index not in self._outputs:
                self._outputs[index] = output = stream.output()
                self._note_finished(index, FinishedRequest.of(output, reason, error))

    def _note_finished(self, index: int, finished: FinishedRequest) -> None:
        exchange, request = self._exchange, self._opened[index].requests[0][0]
        self._serving.metrics.note_finished(finished)
        self._serving.tracer.note(
            self.answers.streams[index].request_id,
            request.params,
            finished,
            exchange.trace_headers,
        )

    def note_error(self, error: Exception) -> None:
        self._exchange.error = str(error)
        has_begun = self._exchange.num_tokens > 0 or error is self._error
        self._is_refused = isinstance(error, UserError) and not has_begun

    def _note(self, delta: Delta) -> None:
        exchange = self._exchange
        exchange.num_tokens += len(delta.token_ids)
        self._watches[delta.index].note_tokens(delta)
        if exchange.ttft_s is None and delta.token_ids:
            exchange.ttft_s = time.monotonic() - exchange.start_s
        if delta.output is not None:
            self._outputs[delta.index] = delta.output
            self._note_finished(delta.index, FinishedRequest.of(delta.output))
        if delta.finish_reason is not None:
            exchange.finish_reasons.append(delta.finish_reason)


def enter(
    request: Request, serving: Serving, wanted: SamplingFields | ResponsesRequest
) -> Exchange:
    """What every route does first: ApiError for a model that is not here."""
    exchange = Exchange.of(request.scope)
    exchange.model = serving.check_model(wanted.model)
    serving.note_unknown(exchange.path, wanted.model_extra)
    return exchange


async def open_prompts(
    serving: Serving,
    exchange: Exchange,
    prompts: Callable[[], Sequence[Prompt]],
    params: Callable[[Prompt], SamplingParams],
    priority: int,
) -> list[Opened]:
    """Checks all prompts in a thread; both callables run there."""
    inputs = serving.inputs

    def work() -> list[Opened]:
        given = prompts()
        if serving.config.log_prompts:
            exchange.prompts = [one if isinstance(one, str) else str(one) for one in given]
        return [
            inputs.open(
                index,
                prompt,
                params(prompt),
                request_id=exchange.request_id if not index else f"{exchange.request_id}-{index}",
                priority=priority,
            )
            for index, prompt in enumerate(given)
        ]

    return await asyncio.to_thread(work)


async def respond(
    request: Request, serving: Serving, opened: Sequence[Opened], reply: Reply, *, is_stream: bool
) -> Response:
    """Answers with all at once or as a stream; errors before the first token have a status of their
    own. A client that leaves ends its requests."""
    exchange = Exchange.of(request.scope)
    exchange.is_stream = is_stream
    generation = Generation(serving, exchange, opened)
    try:
        head = reply.begin(generation.answers)
        first = await unless_gone(request, generation.take())
        if is_stream:
            return _Stream(generation, reply, head, first)
        await unless_gone(request, _all(generation))
        whole = await asyncio.to_thread(reply.whole, generation.outputs, generation.usage())
        return Response(whole, media_type="application/json")
    except BaseException as error:
        if isinstance(error, BiremeError):
            generation.note_error(error)
        generation.close()
        raise


async def _all(generation: Generation) -> None:
    while not generation.is_finished:
        await generation.take()


class _Stream(StreamingResponse):
    """Server-sent events; whatever ends it ends its requests."""

    def __init__(
        self, generation: Generation, reply: Reply, head: bytes, first: Sequence[Delta]
    ) -> None:
        self._generation = generation
        events = _events(generation, reply, head, first)
        super().__init__(events, media_type="text/event-stream", headers=_SSE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()


async def _events(
    generation: Generation, reply: Reply, head: bytes, first: Sequence[Delta]
) -> AsyncIterator[bytes]:
    yield head + _added(generation, reply, first)
    try:
        while not generation.is_finished:
            yield _added(generation, reply, await generation.take())
        yield reply.end(generation.usage())
    except BiremeError as error:
        generation.note_error(error)
        yield reply.failed(ApiError.of(error))


def _added(generation: Generation, reply: Reply, deltas: Sequence[Delta]) -> bytes:
    return b"".join([reply.add(delta, generation.usage) for delta in joined(deltas)])


def joined(deltas: Sequence[Delta]) -> list[Delta]:
    """With one delta for those of a continuation that came behind one another: a client that reads
    slowly is sent fewer and longer pieces."""
    found: list[Delta] = []
    for delta in deltas:
        last = found[-1] if found else None
        if last is not None and (last.index, last.choice) == (delta.index, delta.choice):
            found[-1] = msgspec.structs.replace(
                delta,
                text=last.text + delta.text,
                token_ids=last.token_ids + delta.token_ids,
                logprobs=last.logprobs + delta.logprobs,
            )
        else:
            found.append(delta)
    return found
