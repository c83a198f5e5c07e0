"""What `/v1/responses` is asked, as the chat that it stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from bireme.server.errors import ApiError
from bireme.server.protocol.chat import ChatCompletionRequest, ContentPart
from bireme.server.protocol.responses import (
    MAX_METADATA,
    AllowedResponseTools,
    InputItem,
    NamedResponseTool,
    ResponsesRequest,
)

_SAME = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "user")
_OF_STORED = ("id", "status")
_LOGPROBS = "message.output_text.logprobs"


def as_chat(wanted: ResponsesRequest) -> ChatCompletionRequest:
    """ApiError 400 for what needs storage, or what a chat cannot say."""
    _check_storage(wanted)
    _check_metadata(wanted.metadata or {})
    given: dict[str, Any] = {name: getattr(wanted, name) for name in _SAME}
    has_logprobs = wanted.top_logprobs is not None or _LOGPROBS in (wanted.include or ())
    given |= {
        "messages": _messages(wanted),
        "max_completion_tokens": wanted.max_output_tokens,
        "logprobs": has_logprobs,
        "top_logprobs": wanted.top_logprobs,
        "tools": [_tool(index, tool) for index, tool in enumerate(wanted.tools or [])] or None,
        "tool_choice": _choice(wanted),
        "parallel_tool_calls": wanted.parallel_tool_calls,
        "response_format": _format(wanted),
    }
    try:
        return ChatCompletionRequest.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ApiError(400, f"input: {where:.100}: {first['msg']:.200}", param="input") from None


def _check_storage(wanted: ResponsesRequest) -> None:
    for name in ("previous_response_id", "conversation", "prompt"):
        if getattr(wanted, name) is not None:
            raise ApiError(
                400,
                f"nothing is stored here, so {name} names nothing; send the whole conversation",
                param=name,
            )
    if wanted.background:
        raise ApiError(
            400, "nothing is stored here, so background cannot be; leave it out", param="background"
        )


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    if len(metadata) > MAX_METADATA or not all(isinstance(it, str) for it in metadata.values()):
        raise ApiError(
            400,
            f"metadata holds {len(metadata)} pairs; at most {MAX_METADATA} are taken, of texts",
            param="metadata",
        )


def _messages(wanted: ResponsesRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if wanted.instructions is not None:
        messages.append({"role": "system", "content": wanted.instructions})
    if isinstance(wanted.input, str):
        return [*messages, {"role": "user", "content": wanted.input}]
    for index, item in enumerate(wanted.input):
        _add(messages, index, item)
    return messages


def _add(messages: list[dict[str, Any]], index: int, item: InputItem) -> None:
    match item.type or "message":
        case "message":
            messages.append(_message(item))
        case "function_call":
            call = {
                "id": item.call_id,
                "type": "function",
                "function": {"name": item.name, "arguments": item.arguments or "{}"},
            }
            if messages and messages[-1].get("tool_calls"):
                messages[-1]["tool_calls"].append(call)
            else:
                messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        case "function_call_output":
            messages.append(
                {
                    "role": "tool",
                    "content": _content(item.output),
                    "tool_call_id": item.call_id,
                }
            )
        case "reasoning":
            pass
        case kind:
            raise ApiError(
                400, f"input.{index} is of type {kind!r:.60}, which is not supported", param="input"
            )


def _message(item: InputItem) -> dict[str, Any]:
    """With the further fields that a chat's message may have."""
    extra = {name: it for name, it in (item.model_extra or {}).items() if name not in _OF_STORED}
    return {**extra, "role": item.role, "content": _content(item.content), "name": item.name}


def _content(content: str | Sequence[ContentPart] | None) -> Any:
    if content is None or isinstance(content, str):
        return content or ""
    return [part.model_dump() for part in content]


def _tool(index: int, tool: Any) -> dict[str, Any]:
    if tool.type != "function":
        raise ApiError(
            400, f"tools.{index} is of type {tool.type!r:.60}; only function is supported",
            param="tools",
        )  # fmt: skip
    function = tool.model_dump(exclude_none=True, exclude={"type"})
    return {"type": "function", "function": function}


def _choice(wanted: ResponsesRequest) -> Any:
    choice = wanted.tool_choice
    if isinstance(choice, NamedResponseTool):
        return _named(choice)
    if isinstance(choice, AllowedResponseTools):
        allowed = {"mode": choice.mode, "tools": list(map(_named, choice.tools))}
        return {"type": choice.type, "allowed_tools": allowed}
    return choice if wanted.tools or choice == "required" else None


def _named(tool: NamedResponseTool) -> dict[str, Any]:
    return {"type": "function", "function": {"name": tool.name}}


def _format(wanted: ResponsesRequest) -> dict[str, Any] | None:
    form = wanted.text.format if wanted.text is not None else None
    if form is None:
        return None
    if form.type != "json_schema":
        return {"type": form.type}
    return {"type": form.type, "json_schema": {"name": form.name or "", "schema": form.schema_}}
