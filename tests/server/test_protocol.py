"""What clients send is refused at its first fault, and bounded in what it costs to look through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from bireme.server.protocol.chat import ChatCompletionRequest
from bireme.server.protocol.common import MAX_FIELDS, MAX_OBJECTS
from bireme.server.protocol.completions import CompletionRequest
from bireme.server.protocol.responses import ResponsesRequest
from bireme.server.protocol.tokenize import DetokenizeRequest, TokenizeRequest

MANY = [None] * 1000
HELLO = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (CompletionRequest, {"prompt": MANY}),
        (CompletionRequest, {"prompt": [MANY]}),
        (CompletionRequest, {"prompt": "x", "stop": MANY}),
        (CompletionRequest, {"prompt": "x", "stop_token_ids": MANY}),
        (CompletionRequest, {"prompt": "x", "structured_outputs": {"choice": MANY}}),
        (ChatCompletionRequest, {"messages": MANY}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": MANY}]}),
        (ChatCompletionRequest, {"messages": [{"role": "assistant", "tool_calls": MANY}]}),
        (ChatCompletionRequest, {"messages": HELLO, "tools": MANY}),
        (ResponsesRequest, {"input": MANY}),
        (ResponsesRequest, {"input": [{"content": MANY}]}),
        (ResponsesRequest, {"input": "x", "tools": MANY}),
        (ResponsesRequest, {"input": "x", "include": MANY}),
        (TokenizeRequest, {"messages": MANY}),
        (DetokenizeRequest, {"tokens": MANY}),
    ],
)
def test_a_list_of_faults_is_one_fault(model: type[BaseModel], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as found:
        model.model_validate(body)
    assert found.value.error_count() <= 4  # one a way to read it


PART = {"type": "text", "text": "x"}
CALL = {"function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", **fields}]}


@pytest.mark.parametrize(
    ("model", "body_of"),
    [
        (ChatCompletionRequest, lambda many: {"messages": HELLO * many}),
        (ChatCompletionRequest, lambda many: chat(content=[PART] * many)),
        (ChatCompletionRequest, lambda many: chat(tool_calls=[CALL] * many)),
        (ChatCompletionRequest, lambda many: {"messages": HELLO, "tools": [TOOL] * many}),
        (ResponsesRequest, lambda many: {"input": HELLO * many}),
        (ResponsesRequest, lambda many: {"input": "x", "tools": [TOOL] * many}),
        (TokenizeRequest, lambda many: {"messages": HELLO * many}),
        (TokenizeRequest, lambda many: {"messages": HELLO, "tools": [TOOL] * many}),
    ],
    ids=range(8),
)
def test_lists_of_objects_are_bounded(
    model: type[BaseModel], body_of: Callable[[int], dict[str, Any]]
) -> None:
    model.model_validate(body_of(MAX_OBJECTS))
    with pytest.raises(ValidationError, match=f"at most {MAX_OBJECTS} items"):
        model.model_validate(body_of(MAX_OBJECTS + 1))


@pytest.mark.parametrize("place", [lambda many: {**chat(), **many}, lambda many: chat(**many)])
def test_an_object_has_so_many_fields(place: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Beside the one that each of these has anyway."""
    many: dict[str, Any] = {f"field {index}": 1 for index in range(MAX_FIELDS - 1)}
    ChatCompletionRequest.model_validate(place(many))
    with pytest.raises(ValidationError, match=f"{MAX_FIELDS + 1} fields .* at most {MAX_FIELDS}"):
        ChatCompletionRequest.model_validate(place({**many, "another": 1}))


def test_what_a_template_is_given_is_bounded() -> None:
    many = {f"name {index}": 1 for index in range(MAX_FIELDS + 1)}
    for model in (ChatCompletionRequest, TokenizeRequest):
        with pytest.raises(ValidationError, match=f"at most {MAX_FIELDS} items"):
            model.model_validate({"messages": HELLO, "chat_template_kwargs": many})
