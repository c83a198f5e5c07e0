"""`/v1/responses`: a conversation as items, through the same way as a chat; nothing is stored."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from bireme.engine.callers import Answers
from bireme.outputs import Delta, Logprobs, RequestOutput
from bireme.server.chat import chat_params, chat_prompt
from bireme.server.errors import ApiError, FieldNames
from bireme.server.exchange import Exchange
from bireme.server.generation import enter, open_prompts, respond
from bireme.server.logprobs import TokenTexts, chat_logprobs
from bireme.server.protocol.chat import ChatCompletionRequest, TokenLogprob
from bireme.server.protocol.common import Usage
from bireme.server.protocol.responses import (
    Event,
    IncompleteDetails,
    InputDetails,
    ModelResponse,
    OutputCall,
    OutputDetails,
    OutputMessage,
    OutputText,
    ResponseError,
    ResponsesRequest,
    ResponseUsage,
)
from bireme.server.response_input import as_chat
from bireme.server.serving import Serving
from bireme.server.sse import sse
from bireme.server.tools.choice import ToolUse, tool_use
from bireme.server.tools.parsers import CallPiece, Parsed
from bireme.text.tokenizer import Tokenizer


async def answer(request: Request, serving: Serving, wanted: ResponsesRequest) -> Response:
    """Raises ApiError or RequestError for what cannot be served."""
    exchange = enter(request, serving, wanted)
    chat = as_chat(wanted)
    tools = tool_use(chat, serving.tool_style)
    structure = "text" if tools.structure is None else "tools"
    names = FieldNames("input", structure, "max_output_tokens")
    with names.used():
        opened = await open_prompts(
            serving,
            exchange,
            lambda: [chat_prompt(serving, chat, tools)],
            lambda prompt: chat_params(serving, chat, tools, prompt),
            wanted.priority or 0,
        )
        tokenizer = serving.inputs.tokenizer
        reply = ResponsesReply(exchange, wanted, chat, tools, names, tokenizer)
        return await respond(request, serving, opened, reply, is_stream=bool(wanted.stream))


class ResponsesReply:
    """The answer to one request of `/v1/responses`: items, of which the last is being written."""

    def __init__(
        self,
        exchange: Exchange,
        wanted: ResponsesRequest,
        chat: ChatCompletionRequest,
        tools: ToolUse,
        names: FieldNames,
        tokenizer: Tokenizer,
    ) -> None:
        self._names = names
        self._wanted, self._num_top = wanted, chat.top_logprobs or 0
        self._tokenizer, self._texts = tokenizer, TokenTexts(tokenizer)
        self._logprobs: list[TokenLogprob] = []  # of tokens whose text is not settled yet
        self._model = exchange.model or ""
        self._id, self._created_s = f"resp_{exchange.request_id}", time.time()
        self._parser = None if tools.parser is None else tools.parser()
        self._items: list[OutputMessage | OutputCall] = []
        self._is_open = False
        self._num_events = 0
        self._reason: str | None = None

    # --- events --------------------------------------------------------------------------------

    def begin(self, answers: Answers) -> bytes:
        response = self._response("in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def add(self, delta: Delta, usage: Callable[[], Usage]) -> bytes:
        is_end = delta.finish_reason is not None
        pieces = [(delta.text, delta.logprobs)]
        if delta.logprobs:
            pieces = self._texts.add(delta, is_end=is_end)
        events = b"".join([self._add_piece(*piece) for piece in pieces])
        if is_end:
            events += self._add_rest()
            self._reason = delta.finish_reason
            events += self._close_item()
        return events

    def _add_piece(self, text: str, logprobs: Sequence[Logprobs]) -> bytes:
        self._logprobs += chat_logprobs(logprobs, self._num_top, self._tokenizer).content
        return self._add_parsed(self._parser.add(text) if self._parser else Parsed([text]))

    def _add_rest(self) -> bytes:
        events = self._add_parsed(self._parser.finish()) if self._parser else b""
        if self._logprobs and not (self._items and isinstance(self._items[-1], OutputCall)):
            events += self._add_text("")
        return events

    def _add_parsed(self, found: Parsed) -> bytes:
        return b"".join(
            [
                self._add_text(part) if isinstance(part, str) else self._add_call(part)
                for part in found.parts
                if part
            ]
        )

    def end(self, usage: Usage) -> bytes:
        status = self._status
        return self._event(f"response.{status}", response=self._response(status, usage))

    def failed(self, error: ApiError) -> bytes:
        error = self._names.told(error)
        code = error.code or error.type
        response = self._response("failed")
        response.error = ResponseError(code=code, message=error.message)
        return self._event("response.failed", response=response) + self._event(
            "error", code=code, message=error.message, param=error.param
        )

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> bytes:
        (output,) = outputs
        (made,) = output.outputs
        logprobs = made.logprobs or []
        reason, ids = made.finish_reason, list(made.token_ids)
        self.add(Delta(0, made.text, ids, None, 0, reason, None, logprobs), lambda: usage)
        return self._response(self._status, usage).as_json()

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._num_events += 1
        event = Event(type=kind, sequence_number=self._num_events - 1, **fields)
        return sse(event.as_json(), kind)

    # --- items ---------------------------------------------------------------------------------

    @property
    def _at(self) -> dict[str, Any]:
        """Where the item is that is being written."""
        return {"output_index": len(self._items) - 1, "item_id": self._items[-1].id}

    def _add_text(self, text: str) -> bytes:
        """With the tokens that brought it."""
        events, logprobs = b"", self._logprobs
        self._logprobs = []
        if not self._is_open or not isinstance(self._items[-1], OutputMessage):
            events = self._close_item() + self._open_message()
        message = self._items[-1]
        assert isinstance(message, OutputMessage)
        part = message.content[0]
        part.text += text
        part.logprobs += logprobs
        return events + self._event(
            "response.output_text.delta",
            **self._at,
            content_index=0,
            delta=text,
            logprobs=logprobs,
        )

    def _open_message(self) -> bytes:
        part = OutputText(type="output_text", text="", annotations=[], logprobs=[])
        item = OutputMessage(
            id=f"msg_{secrets.token_hex(16)}",
            type="message",
            status="in_progress",
            role="assistant",
            content=[],
        )
        events = self._open(item)
        item.content = [part]
        return events + self._event(
            "response.content_part.added", **self._at, content_index=0, part=part
        )

    def _add_call(self, piece: CallPiece) -> bytes:
        events = b""
        self._logprobs = []
        if piece.name is not None:
            events = self._close_item() + self._open(
                OutputCall(
                    id=f"fc_{secrets.token_hex(16)}",
                    type="function_call",
                    status="in_progress",
                    call_id=piece.id or "",
                    name=piece.name,
                    arguments="",
                )
            )
        if not piece.arguments:
            return events
        call = self._items[-1]
        assert isinstance(call, OutputCall)
        call.arguments += piece.arguments
        return events + self._event(
            "response.function_call_arguments.delta", **self._at, delta=piece.arguments
        )

    def _open(self, item: OutputMessage | OutputCall) -> bytes:
        self._items.append(item)
        self._is_open = True
        index = len(self._items) - 1
        return self._event("response.output_item.added", output_index=index, item=item)

    def _close_item(self) -> bytes:
        if not self._is_open:
            return b""
        self._is_open = False
        item = self._items[-1]
        item.status = "completed" if self._reason in (None, "stop") else "incomplete"
        if isinstance(item, OutputCall):
            events = self._event(
                "response.function_call_arguments.done",
                **self._at,
                name=item.name,
                arguments=item.arguments,
            )
        else:
            part = item.content[0]
            where = {**self._at, "content_index": 0}
            events = self._event(
                "response.output_text.done", **where, text=part.text, logprobs=part.logprobs
            ) + self._event("response.content_part.done", **where, part=part)
        index = len(self._items) - 1
        return events + self._event("response.output_item.done", output_index=index, item=item)

    # --- the whole -----------------------------------------------------------------------------

    @property
    def _status(self) -> str:
        return "completed" if self._reason == "stop" else "incomplete"

    @property
    def _why_cut(self) -> str:
        return "max_output_tokens" if self._reason == "length" else str(self._reason)

    def _response(self, status: str, usage: Usage | None = None) -> ModelResponse:
        wanted = self._wanted
        form = wanted.text.format if wanted.text is not None else None
        is_cut = status == "incomplete"
        return ModelResponse(
            id=self._id,
            object="response",
            created_at=self._created_s,
            status=status,  # type: ignore[arg-type]
            error=None,
            incomplete_details=IncompleteDetails(reason=self._why_cut) if is_cut else None,
            instructions=wanted.instructions,
            max_output_tokens=wanted.max_output_tokens,
            metadata=wanted.metadata or {},
            model=self._model,
            output=list(self._items),
            parallel_tool_calls=wanted.parallel_tool_calls is not False,
            previous_response_id=None,
            store=False,
            temperature=wanted.temperature,
            text={"format": {"type": "text"} if form is None else _told(form)},
            tool_choice=_choice(wanted),
            tools=[_told(tool) for tool in wanted.tools or []],
            top_p=wanted.top_p,
            truncation="disabled",
            usage=None if usage is None else _usage(usage),
        )


def _told(fields: Any) -> dict[str, Any]:
    told: dict[str, Any] = fields.model_dump(by_alias=True, exclude_none=True)
    return told


def _choice(wanted: ResponsesRequest) -> str | Mapping[str, Any]:
    choice = wanted.tool_choice or "auto"
    return choice if isinstance(choice, str) else _told(choice)


def _usage(usage: Usage) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputDetails(reasoning_tokens=0),
        total_tokens=usage.total_tokens,
    )
