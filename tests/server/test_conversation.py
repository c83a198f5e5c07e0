"""What a chat template sees of the messages that a client sends."""

from __future__ import annotations

from typing import Any

import pytest

from bireme.checkpoint.hub import resolve_model
from bireme.server.conversation import template_messages
from bireme.server.errors import ApiError
from bireme.server.protocol.chat import AllowedTools, ChatCompletionRequest
from bireme.server.protocol.responses import ResponsesRequest
from bireme.server.response_input import as_chat
from bireme.text.tokenizer import Message, Tokenizer

TEMPLATE = """{% for message in messages %}{{ message.role }}:
{%- if message.reasoning_content is defined %}<think>{{ message.reasoning_content }}</think>{% endif %}
{%- for part in message.thinking or [] %}[{{ part.text }}]{% endfor %}
{{- message.content }};{% endfor %}"""


def seen(*messages: dict[str, Any]) -> list[Message]:
    return template_messages(ChatCompletionRequest(messages=list(messages)).messages)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "extra",
    [
        {"reasoning_content": "hm"},
        {"thinking": [{"type": "thinking", "text": "hm", "more": [1]}]},
        {"metadata": {"a": {"b": None}}, "prefix": True, "weight": 0},
    ],
    ids=str,
)
def test_further_fields_of_a_message_are_the_templates(extra: dict[str, Any]) -> None:
    said = {"role": "assistant", "content": "x"}
    assert seen({**said, **extra}) == [{**said, **extra}]


def test_a_further_field_that_is_null_is_left_out_as_our_own_are() -> None:
    said = {"role": "user", "content": "x"}
    assert seen({**said, "reasoning_content": None, "name": None}) == [said]


def test_a_part_that_refuses_is_text() -> None:
    (message,) = seen({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]})
    assert message["content"] == "no"


def chat_of(**wanted: Any) -> ChatCompletionRequest:
    return as_chat(ResponsesRequest.model_validate({"input": "x", **wanted}))


def test_messages_of_a_response_have_the_fields_that_those_of_a_chat_have() -> None:
    item = {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed"}
    parts = [{"type": "output_text", "text": "a"}, {"type": "refusal", "refusal": "no"}]
    extra = {"reasoning_content": "hm", "name": "n"}
    found = chat_of(input=[{**item, **extra, "content": parts}])
    expected = {"role": "assistant", "content": "a\nno", **extra}
    assert template_messages(found.messages) == [expected]


@pytest.mark.parametrize(
    ("wanted", "param"),
    [
        ({"previous_response_id": "r"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"conversation": {"id": "c"}}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"background": True}, "background"),
    ],
)
def test_what_a_response_would_have_to_store_is_refused(wanted: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError, match="nothing is stored here") as caught:
        chat_of(**wanted)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_a_responses_choice_of_tools_is_that_of_a_chat() -> None:
    assert chat_of(tool_choice="required").tool_choice == "required"
    assert chat_of(tool_choice="auto").tool_choice is None
    tool, ref = {"type": "function", "name": "f"}, {"type": "function", "name": "f"}
    choice = {"type": "allowed_tools", "mode": "required", "tools": [ref]}
    found = chat_of(tools=[tool], tool_choice=choice).tool_choice
    assert isinstance(found, AllowedTools)
    assert (found.allowed_tools.mode, found.allowed_tools.tools[0].function.name) == (
        "required",
        "f",
    )


@pytest.mark.parametrize(
    ("written", "given"), [('{"a": 1}', {"a": 1}), ("", {}), ('{"a": 1', '{"a": 1'), ("a = 1", "a = 1")]
)  # fmt: skip
def test_arguments_are_an_object_or_the_text_that_is_none(written: str, given: object) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": written}}
    (message,) = seen({"role": "assistant", "content": "x", "tool_calls": [call]})
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": given}


def test_a_template_writes_what_was_thought() -> None:
    tokenizer = Tokenizer(resolve_model("demo"), TEMPLATE)
    messages = seen(
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "reasoning_content": "hm", "thinking": [{"text": "d"}]},
    )  # fmt: skip
    assert tokenizer.apply_chat_template(messages) == "user:a\nb;assistant:<think>hm</think>[d]c;"
