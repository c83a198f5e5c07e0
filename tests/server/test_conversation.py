"""What a chat template sees of the messages that a client sends."""

from __future__ import annotations

from typing import Any

import pytest

from bireme.checkpoint.hub import resolve_model
from bireme.server.conversation import template_messages
from bireme.server.protocol.chat import ChatCompletionRequest
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
