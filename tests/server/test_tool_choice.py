"""What `tool_choice` makes of the tools: the same calls whether one is named or any must be made."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bireme.checkpoint.hub import resolve_model
from bireme.engine.input_processor import InputProcessor, ServedModel
from bireme.server.protocol.chat import ChatCompletionRequest
from bireme.server.tools.choice import ToolUse, tool_use

INPUTS = InputProcessor(ServedModel("demo", resolve_model("demo"), 2048, 1024, frozenset({2})))
NAMED = {"type": "function", "function": {"name": "f"}}


def use(tools: dict[str, Any], choice: Any, **more: Any) -> ToolUse:
    """Of tools by their names with their parameters."""
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "tools": [
            {"type": "function", "function": {"name": name, "parameters": parameters}}
            for name, parameters in tools.items()
        ],
        "tool_choice": choice,
    }
    return tool_use(ChatCompletionRequest.model_validate({**body, **more}), "hermes")


def fits(made: ToolUse, text: str) -> bool:
    """True if a model that is held to it can write this text and end."""
    matcher = INPUTS.matcher(made.structure)
    assert matcher is not None
    for id_ in INPUTS.tokenizer.encode(text, add_special_tokens=False):
        if not matcher.mask()[id_ // 8] >> (id_ % 8) & 1:
            return False
        matcher.accept([id_])
    return matcher.is_stopped


def object_of(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


LEAF = {"x": True}
OF_LEAF = object_of(x={"type": "boolean"})


@pytest.mark.parametrize(
    ("parameters", "good", "bad"),
    [
        ({**object_of(l={"$ref": "#/definitions/L"}), "definitions": {"L": OF_LEAF}}, {"l": LEAF}, {"l": 1}),
        ({**object_of(l={"$ref": "#/$defs/L"}), "$defs": {"L": OF_LEAF}}, {"l": LEAF}, {"l": 1}),
        (object_of(a={"type": "boolean"}, b={"$ref": "#/properties/a"}), {"a": True, "b": False}, {"a": True, "b": 1}),
        (object_of(c={"anyOf": [{"$ref": "#"}, {"type": "null"}]}), {"c": {"c": None}}, {"c": {"c": 1}}),
        (object_of(a={"const": {"$ref": "#/x"}}), {"a": {"$ref": "#/x"}}, {"a": {"$ref": "#/$defs/0/x"}}),
        (object_of(a={"enum": [{"$ref": "#"}, 1]}), {"a": {"$ref": "#"}}, {"a": 2}),
        ({**object_of(default={"$ref": "#/$defs/L"}), "$defs": {"L": OF_LEAF}}, {"default": LEAF}, {"default": 1}),
        (None, {}, {"a": 1}),
        ({}, {}, {"a": 1}),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_a_tool_takes_the_same_arguments_named_or_required(
    parameters: Any, good: Any, bad: Any
) -> None:
    named, required = use({"f": parameters}, NAMED), use({"f": parameters}, "required")
    for arguments, is_right in ((good, True), (bad, False)):
        assert fits(named, json.dumps(arguments)) == is_right
        call = json.dumps([{"name": "f", "parameters": arguments}])
        assert fits(required, call) == is_right


def test_tools_may_define_one_name_differently() -> None:
    wanted = object_of(a={"$ref": "#/$defs/A"})
    tools = {
        name: {**wanted, "$defs": {"A": {"type": kind}}}
        for name, kind in (("f", "boolean"), ("g", "null"))
    }
    made = use(tools, "required")
    for name, value, is_right in (("f", True, True), ("g", None, True), ("g", True, False)):
        call = [{"name": name, "parameters": {"a": value}}]
        assert fits(made, json.dumps(call)) == is_right
