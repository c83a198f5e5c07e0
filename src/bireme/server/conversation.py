"""Messages as clients send them, and as chat templates expect them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from bireme.server.errors import ApiError
from bireme.server.protocol.chat import ChatMessage, ContentPart, ToolCall
from bireme.text.tokenizer import Message

_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")

_FIELDS = {"messages", "tools", "add_generation_prompt", "continue_final_message"}


def template_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """ApiError 400 for content that is no text."""
    return [_message(index, message) for index, message in enumerate(messages)]


def template_variables(given: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """`chat_template_kwargs`; ApiError 400 for what a request has fields of its own for."""
    taken = _FIELDS & set(given or ())
    if taken:
        raise ApiError(
            400,
            f"chat_template_kwargs holds {min(taken)}, which is a field beside it",
            param="chat_template_kwargs",
        )
    return given or {}


def _message(index: int, message: ChatMessage) -> Message:
    """With all further fields that are given: templates read `reasoning_content` and its like."""
    role = "system" if message.role == "developer" else message.role
    extra = {name: it for name, it in (message.model_extra or {}).items() if it is not None}
    found: Message = {**extra, "role": role, "content": _text(index, message.content)}
    if message.name is not None:
        found["name"] = message.name
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        found["tool_calls"] = [_call(call) for call in message.tool_calls]
    return found


def _text(index: int, content: str | Sequence[ContentPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = [part.refusal if part.type == "refusal" else part.text for part in content]
    for part, text in zip(content, texts, strict=True):
        if part.type not in _TEXT_PARTS or text is None:
            raise ApiError(
                400,
                f"messages.{index}.content holds a part of type {part.type!r:.60}; "
                "this model reads text alone",
                param="messages",
            )
    return "\n".join(text or "" for text in texts)


def _call(call: ToolCall) -> dict[str, Any]:
    """Templates want the arguments as an object; of a call that was cut short they are a text."""
    arguments = call.function.arguments or "{}"
    with suppress(ValueError, RecursionError):
        arguments = json.loads(arguments)
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }
