"""`/v1/completions`: prompts as they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from bireme.engine.callers import Answers
from bireme.engine.input_processor import Prompt
from bireme.engine.streams import PromptStream
from bireme.outputs import CompletionOutput, Delta, Logprobs, RequestOutput
from bireme.sampling_params import SamplingParams
from bireme.server.chunked import ChunkedReply
from bireme.server.errors import ApiError, FieldNames
from bireme.server.exchange import Exchange
from bireme.server.generation import enter, open_prompts, respond
from bireme.server.logprobs import TokenPlaces, TokenTold, completion_logprobs, prompt_logprobs
from bireme.server.protocol.common import Usage
from bireme.server.protocol.completions import (
    MAX_PROMPTS,
    Completion,
    CompletionChoice,
    CompletionRequest,
)
from bireme.server.serving import Serving
from bireme.server.usage import UsageOf, usage_of

_DEFAULT_MAX_TOKENS = 16


async def complete(request: Request, serving: Serving, wanted: CompletionRequest) -> Response:
    """Raises ApiError or RequestError for what cannot be served."""
    exchange = enter(request, serving, wanted)
    usage = usage_of(wanted)
    _check(wanted)
    serving.check_fits(len(wanted.prompts) * max(1, wanted.n or 1))
    names = FieldNames("prompt", wanted.structure_field)
    with names.used():
        opened = await open_prompts(
            serving,
            exchange,
            lambda: _prompts(serving, wanted),
            lambda _: _params(serving, wanted),
            wanted.priority or 0,
        )
        reply = CompletionReply(serving, exchange, wanted, usage, names)
        return await respond(request, serving, opened, reply, is_stream=bool(wanted.stream))


def _check(wanted: CompletionRequest) -> None:
    if not wanted.prompts:
        raise ApiError(400, "prompt is an empty list; give at least one prompt", param="prompt")
    if len(wanted.prompts) > MAX_PROMPTS:
        raise ApiError(
            400,
            f"{len(wanted.prompts)} prompts are too many; send at most {MAX_PROMPTS}",
            param="prompt",
        )
    if wanted.suffix:
        raise ApiError(400, "suffix is not supported; leave it out", param="suffix")
    if wanted.best_of not in (None, wanted.n or 1):
        raise ApiError(400, "best_of other than n is not supported; leave it out", param="best_of")


def _prompts(serving: Serving, wanted: CompletionRequest) -> list[Prompt]:
    if wanted.add_special_tokens is not False:
        return list(wanted.prompts)
    inputs = serving.inputs
    return [
        inputs.encode(one, f"prompt {index}", add_special_tokens=False)
        if isinstance(one, str)
        else one
        for index, one in enumerate(wanted.prompts)
    ]


def _is_echo_alone(wanted: CompletionRequest) -> bool:
    """The prompt's log-probabilities without an answer: one token is made, and not told."""
    return bool(wanted.echo) and wanted.max_tokens == 0


def _params(serving: Serving, wanted: CompletionRequest) -> SamplingParams:
    max_tokens = _DEFAULT_MAX_TOKENS if wanted.max_tokens is None else wanted.max_tokens
    of_prompt = wanted.prompt_logprobs
    if wanted.echo and wanted.logprobs is not None:
        of_prompt = max(wanted.logprobs, of_prompt or 0)
    return wanted.sampling_params(
        serving.defaults,
        max_tokens=1 if _is_echo_alone(wanted) else max_tokens,
        logprobs=wanted.logprobs,
        prompt_logprobs=of_prompt,
    )


class CompletionReply(ChunkedReply):
    """The answer to one request of `/v1/completions`."""

    def __init__(
        self,
        serving: Serving,
        exchange: Exchange,
        wanted: CompletionRequest,
        usage: UsageOf,
        names: FieldNames,
    ) -> None:
        self._tokenizer = serving.inputs.tokenizer if serving.inputs.has_tokenizer else None
        self._wanted = wanted
        self._empty = Completion(
            id=f"cmpl-{exchange.request_id}",
            object="text_completion",
            created=int(time.time()),
            model=exchange.model or "",
            choices=[],
        )
        super().__init__(self._empty, usage, names)
        self._places: dict[int, TokenPlaces] = {}  # by choice
        # By prompt, until its log-probabilities are known.
        self._held: dict[int, list[tuple[Delta, Callable[[], Usage]]]] = {}

    def begin(self, answers: Answers) -> bytes:
        self._streams = answers.streams
        return b""

    def add(self, delta: Delta, usage: Callable[[], Usage]) -> bytes:
        self._held.setdefault(delta.index, []).append((delta, usage))
        return b"" if self._must_wait(delta.index) else self._let_go(delta.index)

    def end(self, usage: Usage) -> bytes:
        return self._let_all_go() + super().end(self._billed(usage))

    def failed(self, error: ApiError) -> bytes:
        return self._let_all_go() + super().failed(error)

    def _let_all_go(self) -> bytes:
        """Of prompts that ended before their log-probabilities were known."""
        return b"".join([self._let_go(prompt) for prompt in list(self._held)])

    def _let_go(self, prompt: int) -> bytes:
        return b"".join([self._told(*one) for one in self._held.pop(prompt)])

    def _must_wait(self, prompt: int) -> bool:
        """An echo shows what the first continuation alone learns."""
        found = self._streams[prompt].prompt_logprobs
        return bool(self._wanted.echo) and found is not None and None in found[1:]

    def _told(self, delta: Delta, usage: Callable[[], Usage]) -> bytes:
        choice = self._choice(delta.index, delta.choice, delta, delta.logprobs)
        return self.chunk([choice], self._usage.along(lambda: self._billed(usage())))

    def _billed(self, usage: Usage) -> Usage:
        """Without the token that an echo alone makes to have the prompt scored."""
        if not _is_echo_alone(self._wanted):
            return usage
        return Usage.of(usage.prompt_tokens, 0, usage.prompt_tokens_details.cached_tokens)

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> bytes:
        choices = (
            self._choice(prompt, answer.index, answer, answer.logprobs or [])
            for prompt, output in enumerate(outputs)
            for answer in output.outputs
        )
        return self.filled(choices, {"usage": self._billed(usage)})

    def _choice(
        self,
        prompt: int,
        number: int,
        piece: Delta | CompletionOutput,
        logprobs: Sequence[Logprobs],
    ) -> CompletionChoice:
        """Of a whole answer, or of the next piece of one."""
        index = prompt * (self._wanted.n or 1) + number
        text, ids, reason = piece.text, list(piece.token_ids), piece.finish_reason
        if _is_echo_alone(self._wanted):
            text, ids, reason = "", [], "length" if reason else None
        is_first = index not in self._places
        places = self._places.setdefault(index, TokenPlaces(self._tokenizer))
        stream = self._streams[prompt]
        shown = self._prompt_text(stream) if is_first and self._wanted.echo else None
        extra: dict[str, Any] = {}
        if self._wanted.logprobs is not None:
            told = [] if shown is None else _of_prompt(stream, shown, places)
            told += _of_answer(ids, logprobs, places)
            extra["logprobs"] = completion_logprobs(told)
        if shown is not None:
            text, ids = shown + text, [*stream.prompt_token_ids, *ids]
        if is_first and self._wanted.prompt_logprobs is not None:
            extra["prompt_logprobs"] = prompt_logprobs(stream.prompt_logprobs)
        if self._wanted.return_token_ids:
            extra["token_ids"] = ids
            if is_first:
                extra["prompt_token_ids"] = list(stream.prompt_token_ids)
        if reason is not None:
            extra["stop_reason"] = piece.stop_reason
        return CompletionChoice(index=index, text=text, finish_reason=reason, **extra)

    def _prompt_text(self, stream: PromptStream) -> str:
        if stream.prompt is not None:
            return stream.prompt
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode(stream.prompt_token_ids)


def _of_prompt(stream: PromptStream, shown: str, places: TokenPlaces) -> list[TokenTold]:
    ids = stream.prompt_token_ids
    found = stream.prompt_logprobs or [None] * len(ids)
    return list(zip(ids, found, places.of_prompt(ids, shown), strict=True))


def _of_answer(
    ids: Sequence[int], logprobs: Sequence[Logprobs], places: TokenPlaces
) -> list[TokenTold]:
    return list(zip(ids, logprobs[: len(ids)], places.of_answer(ids), strict=True))
