"""What `tool_choice` makes of the tools: the same calls whether one is named or any must be made."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bireme.checkpoint.hub import resolve_model
from bireme.engine.input_processor import InputProcessor, ServedModel
from bireme.errors import RequestError
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


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


TOOLS = dict.fromkeys(("f", "g", "h"), OF_LEAF)


def test_allowed_tools_are_all_that_there_are() -> None:
    must = use(TOOLS, allowed("required", "f", "h"))
    for name, is_right in (("f", True), ("g", False), ("h", True)):
        assert fits(must, json.dumps([{"name": name, "parameters": LEAF}])) == is_right
    may = use(TOOLS, allowed("auto", "g"))
    assert may.structure is None
    assert [tool["function"]["name"] for tool in may.shown or ()] == ["g"]
    assert may.parser is not None
    for name, num in (("f", 0), ("g", 1)):
        text = f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>'
        assert len({piece.index for piece in may.parser().add(text).calls}) == num


def test_an_allowed_tool_that_is_none_is_named() -> None:
    with pytest.raises(RequestError, match="tool_choice names 'x', and the tools are f, g, h"):
        use(TOOLS, allowed("auto", "f", "x"))
    with pytest.raises(RequestError, match="tool_choice needs tools"):
        use(TOOLS, allowed("auto"))
