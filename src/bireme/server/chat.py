"""`/v1/chat/completions`: a conversation through the model's chat template."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from bireme.engine.callers import Answers
from bireme.engine.input_processor import Prompt
from bireme.outputs import CompletionOutput, Delta, Logprobs, RequestOutput
from bireme.sampling_params import MAX_LOGPROBS, SamplingParams
from bireme.server.chunked import ChunkedReply, filled, head_of
from bireme.server.conversation import template_messages, template_variables
from bireme.server.errors import ApiError, FieldNames
from bireme.server.exchange import Exchange
from bireme.server.generation import enter, open_prompts, respond
from bireme.server.logprobs import chat_logprobs, prompt_logprobs
from bireme.server.protocol.chat import (
    AnswerMessage,
    CalledFunction,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChoiceDelta,
    ChoiceLogprobs,
    FunctionDelta,
    MadeToolCall,
    ToolCallDelta,
)
from bireme.server.protocol.common import Usage
from bireme.server.serving import Serving
from bireme.server.tools.choice import ToolUse, tool_use
from bireme.server.tools.parsers import CallPiece, Parsed, ToolParser, joined
from bireme.server.usage import UsageOf, usage_of
from bireme.text.tokenizer import Tokenizer


async def chat(request: Request, serving: Serving, wanted: ChatCompletionRequest) -> Response:
    """Raises ApiError or RequestError for what cannot be served."""
    exchange = enter(request, serving, wanted)
    usage, tools = usage_of(wanted), tool_use(wanted, serving.tool_style)
    names = FieldNames(
        "messages",
        structure=wanted.structure_field if tools.structure is None else "tools",
        max_tokens="max_tokens"
        if wanted.max_completion_tokens is None
        else "max_completion_tokens",
    )
    with names.used():
        opened = await open_prompts(
            serving,
            exchange,
            lambda: [chat_prompt(serving, wanted, tools)],
            lambda prompt: chat_params(serving, wanted, tools, prompt),
            wanted.priority or 0,
        )
        reply = ChatReply(exchange, wanted, tools, usage, names, serving.inputs.tokenizer)
        return await respond(request, serving, opened, reply, is_stream=bool(wanted.stream))


def chat_prompt(serving: Serving, wanted: ChatCompletionRequest, tools: ToolUse) -> list[int]:
    """The ids of the conversation."""
    goes_on = bool(wanted.continue_final_message)
    return serving.inputs.chat_ids(
        template_messages(wanted.messages),
        **template_variables(wanted.chat_template_kwargs),
        tools=tools.shown,
        add_generation_prompt=wanted.add_generation_prompt is not False and not goes_on,
        continue_final_message=goes_on,
    )


def chat_params(
    serving: Serving, wanted: ChatCompletionRequest, tools: ToolUse, prompt: Prompt
) -> SamplingParams:
    """Without a bound of its own an answer may fill the context."""
    most = wanted.max_completion_tokens
    most = wanted.max_tokens if most is None else most
    if wanted.top_logprobs is not None and not wanted.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    _check_count("top_logprobs", wanted.top_logprobs)
    extra = {} if tools.structure is None else {"structured_outputs": tools.structure}
    return wanted.sampling_params(
        serving.defaults,
        max_tokens=_room_for(serving, prompt) if most is None else most,
        logprobs=(wanted.top_logprobs or 0) if wanted.logprobs else None,
        prompt_logprobs=wanted.prompt_logprobs,
        **extra,
    )


def _check_count(name: str, value: int | None) -> None:
    if value is not None and not 0 <= value <= MAX_LOGPROBS:
        raise ApiError(400, f"{name}={value} must be from 0 to {MAX_LOGPROBS}", param=name)


def _room_for(serving: Serving, prompt: Prompt) -> int:
    """Tokens that the context leaves; at least one, so that a prompt that fills it is refused."""
    return max(1, serving.inputs.model.max_model_len - len(prompt))


class ChatReply(ChunkedReply):
    """The answer to one request of `/v1/chat/completions`."""

    def __init__(
        self,
        exchange: Exchange,
        wanted: ChatCompletionRequest,
        tools: ToolUse,
        usage: UsageOf,
        names: FieldNames,
        tokenizer: Tokenizer,
    ) -> None:
        self._wanted, self._tools, self._tokenizer = wanted, tools, tokenizer
        self._id = f"chatcmpl-{exchange.request_id}"
        self._about: dict[str, Any] = {"created": int(time.time()), "model": exchange.model}
        empty = ChatCompletionChunk(
            id=self._id, object="chat.completion.chunk", choices=[], **self._about
        )
        super().__init__(empty, usage, names)
        make = tools.parser
        self._parsers = [make() for _ in range(wanted.n or 1)] if make is not None else []
        self._has_calls: set[int] = set()

    def begin(self, answers: Answers) -> bytes:
        self._prompt = answers.streams[0]
        extra: dict[str, Any] = {"usage": None} if self._usage.is_last else {}
        if self._wanted.return_token_ids:
            extra["prompt_token_ids"] = list(self._prompt.prompt_token_ids)
        first = ChoiceDelta(role="assistant", content="")
        return b"".join(
            self.chunk([ChatChunkChoice(index=index, delta=first, finish_reason=None)], extra)
            for index in range(self._wanted.n or 1)
        )

    def add(self, delta: Delta, usage: Callable[[], Usage]) -> bytes:
        found = self._parsed(delta.choice, delta.text, is_end=delta.finish_reason is not None)
        told = ChoiceDelta()
        if found.content:
            told.content = found.content
        if found.calls:
            told.tool_calls = [_as_delta(piece) for piece in found.calls]
        extra: dict[str, Any] = {}
        if self._wanted.logprobs:
            extra["logprobs"] = self._logprobs(delta.logprobs)
        if self._wanted.return_token_ids:
            extra["token_ids"] = delta.token_ids
        if delta.finish_reason is not None:
            extra["stop_reason"] = delta.stop_reason
        elif not (told.model_fields_set or extra or self._usage.is_continuous):
            return b""  # text that is not settled yet
        choice = ChatChunkChoice(
            index=delta.choice,
            delta=told,
            finish_reason=self._reason(delta.choice, delta.finish_reason),
            **extra,
        )
        return self.chunk([choice], self._usage.along(usage))

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> bytes:
        (output,) = outputs
        extra: dict[str, Any] = {"usage": usage}
        if self._wanted.prompt_logprobs is not None:
            extra["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if self._wanted.return_token_ids:
            extra["prompt_token_ids"] = output.prompt_token_ids
        empty = ChatCompletion.model_construct(
            id=self._id, object="chat.completion", choices=[], **self._about
        )
        return filled(head_of(empty), map(self._choice, output.outputs), extra)

    def _choice(self, answer: CompletionOutput) -> ChatChoice:
        found = self._parsed(answer.index, answer.text, is_end=True)
        message = AnswerMessage(role="assistant", content=found.content)
        if found.calls:
            message.content = found.content or None
            message.tool_calls = [_as_call(piece) for piece in joined(found.calls)]
        likely = answer.logprobs if self._wanted.logprobs else None
        choice = ChatChoice(
            index=answer.index,
            message=message,
            logprobs=None if likely is None else self._logprobs(likely),
            finish_reason=self._reason(answer.index, answer.finish_reason),
            stop_reason=answer.stop_reason,
        )
        if self._wanted.return_token_ids:
            choice.token_ids = answer.token_ids
        return choice

    def _logprobs(self, tokens: Sequence[Logprobs]) -> ChoiceLogprobs:
        return chat_logprobs(tokens, self._wanted.top_logprobs or 0, self._tokenizer)

    def _parsed(self, choice: int, text: str, *, is_end: bool) -> Parsed:
        if not self._parsers:
            return Parsed([text] if text else [])
        parser: ToolParser = self._parsers[choice]
        found = parser.add(text)
        if is_end:
            rest = parser.finish()
            found = Parsed(found.parts + rest.parts)
        if found.calls:
            self._has_calls.add(choice)
        return found

    def _reason(self, choice: int, reason: str | None) -> str | None:
        """A call that was made ends an answer; one that was asked for by name is the answer."""
        is_call = reason == "stop" and choice in self._has_calls and not self._tools.is_named
        return "tool_calls" if is_call else reason


def _as_delta(piece: CallPiece) -> ToolCallDelta:
    if piece.name is None:
        return ToolCallDelta(index=piece.index, function=FunctionDelta(arguments=piece.arguments))
    return ToolCallDelta(
        index=piece.index,
        id=piece.id,
        type="function",
        function=FunctionDelta(name=piece.name, arguments=piece.arguments),
    )


def _as_call(piece: CallPiece) -> MadeToolCall:
    return MadeToolCall(
        id=piece.id or "",
        type="function",
        function=CalledFunction(name=piece.name or "", arguments=piece.arguments),
    )
