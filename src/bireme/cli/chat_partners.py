"""Partners of a chat: a model in this process, and any OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from bireme.cli.conversation import Message, Piece, TooLong
from bireme.errors import EngineError

if TYPE_CHECKING:
    from bireme.bench.client import Client, Target
    from bireme.engine.async_llm import AsyncLLM

_SCRAPE_S = 0.5
_BUSY = re.compile(
    r'^bireme:rank_busy_seconds_total\{[^}]*\bstage="(\d+)"[^}]*\} (\S+)', re.MULTILINE
)
_TOO_LONG = re.compile(r"context|too long|length|max_model_len|tokens")


class ModelPartner:
    """An `AsyncLLM`, begun and ended with the chat."""

    def __init__(self, llm: AsyncLLM, max_tokens: int, **sampling: Any) -> None:
        self._llm, self._max_tokens, self._sampling = llm, max_tokens, sampling
        self._before: dict[int, float] = {}
        self._begun_s = 0.0

    async def begin(self) -> list[str]:
        self._llm.chat_ids([{"role": "user", "content": "?"}])  # refused before any rank starts
        await self._llm.begin()
        return self._llm.describe()

    async def answer(self, messages: list[Message]) -> AsyncGenerator[Piece]:
        from bireme.sampling_params import SamplingParams

        ids = self._llm.chat_ids(messages)
        params = SamplingParams(max_tokens=self._num_new(len(ids)), **self._sampling)
        self._before, self._begun_s = self._busy_seconds(), time.monotonic()
        async for delta in self._llm.stream(ids, params):
            yield Piece(delta.text, len(delta.token_ids))

    def _num_new(self, num_ids: int) -> int:
        """Tokens to ask for: an eighth of the context must be left at least, or all that is wanted."""
        longest = self._llm.inputs.model.max_model_len
        room = longest - num_ids
        if room < min(self._max_tokens, max(1, longest // 8)):
            raise TooLong(f"the conversation has {num_ids} tokens; the context holds {longest}")
        return min(room, self._max_tokens)

    def busy_shares(self) -> Mapping[int, float]:
        return _shares(self._before, self._busy_seconds(), time.monotonic() - self._begun_s)

    def _busy_seconds(self) -> dict[int, float]:
        counts: dict[int, list[float]] = {}
        for rank in self._llm.executor.rank_stats():
            counts.setdefault(rank.stage, []).append(rank.busy_s)
        return _means(counts)

    async def end(self) -> None:
        await self._llm.aclose()


class ServerPartner:
    """A server at a URL; /metrics is asked now and then while it answers, if it counts its stages."""

    def __init__(self, target: Target, max_tokens: int) -> None:
        self._target, self._max_tokens = target, max_tokens
        self._client: Client | None = None
        self._has_counters = True
        self._shares: dict[int, float] = {}

    @property
    def _open(self) -> Client:
        assert self._client is not None, "begin comes first"
        return self._client

    async def begin(self) -> list[str]:
        from bireme.bench.client import Client

        self._client = await Client(self._target, reuses_connections=False).__aenter__()
        return [f"{await self._client.find_model()} at {self._target.base_url}"]

    async def answer(self, messages: list[Message]) -> AsyncGenerator[Piece]:
        from bireme.bench.client import Refused
        from bireme.bench.streamed import StreamError

        try:
            async with self._watched(), aclosing(self._pieces(messages)) as pieces:
                async for piece in pieces:
                    yield piece
        except StreamError as error:
            is_refused = isinstance(error, Refused) and 400 <= error.status < 500
            if is_refused and _TOO_LONG.search(str(error)):
                raise TooLong(str(error)) from None
            raise EngineError(str(error)) from None

    async def _pieces(self, messages: list[Message]) -> AsyncGenerator[Piece]:
        """A piece is taken for a token, until the server says how many they were."""
        from bireme.bench.streamed import StreamError, read_chunk

        body = self._target.chat_body(self._open.model, messages, self._max_tokens)
        num_tokens, is_finished = 0, False
        async with aclosing(self._open.stream(body)) as events:
            async for data in events:
                chunk = read_chunk(data)
                choice = chunk.choices[0] if chunk and chunk.choices else None
                is_finished |= chunk is None or bool(choice and choice.finish_reason)
                if choice and choice.delta and choice.delta.text:
                    num_tokens += 1
                    yield Piece(choice.delta.text, 1)
                if chunk and chunk.usage and chunk.usage.completion_tokens:
                    yield Piece("", chunk.usage.completion_tokens - num_tokens)
                    num_tokens = chunk.usage.completion_tokens
        if not is_finished:
            raise StreamError(f"the answer broke off after {num_tokens} tokens")

    def busy_shares(self) -> Mapping[int, float]:
        return self._shares

    @asynccontextmanager
    async def _watched(self) -> AsyncGenerator[None]:
        """Within it `busy_shares` is kept up to date, and once more when it is left."""
        self._shares = {}
        before, start_s = await self._busy_seconds(), time.monotonic()
        watching = asyncio.ensure_future(self._watch(before, start_s))
        try:
            yield
            await self._look(before, start_s)
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching

    async def _watch(self, before: dict[int, float], start_s: float) -> None:
        while before:
            await asyncio.sleep(_SCRAPE_S)
            await self._look(before, start_s)

    async def _look(self, before: dict[int, float], start_s: float) -> None:
        if before:
            now, elapsed_s = await self._busy_seconds(), time.monotonic() - start_s
            self._shares = _shares(before, now, elapsed_s)

    async def _busy_seconds(self) -> dict[int, float]:
        """Of each stage, the mean over replicas; the server is not asked again if it counts none."""
        if not self._has_counters:
            return {}
        found = busy_seconds(await self._open.get_text("/metrics"))
        self._has_counters = bool(found)
        return found

    async def end(self) -> None:
        if self._client is not None:
            await self._client.__aexit__()


def busy_seconds(metrics: str) -> dict[int, float]:
    """Stage to the mean of its counters, from Prometheus' text."""
    counts: dict[int, list[float]] = {}
    for stage, seconds in _BUSY.findall(metrics):
        counts.setdefault(int(stage), []).append(float(seconds))
    return _means(counts)


def _means(counts: Mapping[int, list[float]]) -> dict[int, float]:
    return {stage: sum(each) / len(each) for stage, each in counts.items()}


def _shares(
    before: Mapping[int, float], now: Mapping[int, float], elapsed_s: float
) -> dict[int, float]:
    """Of the time since `before`, by stage."""
    return {
        stage: min(1.0, (now[stage] - busy_s) / elapsed_s)
        for stage, busy_s in sorted(before.items())
        if stage in now
    }
