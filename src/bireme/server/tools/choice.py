"""What `tool_choice` asks for: what the model is told, what its text must be, and who reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bireme.errors import RequestError
from bireme.sampling_params import StructuredOutputsParams
from bireme.server.protocol.chat import AllowedTools, ChatCompletionRequest, NamedTool, Tool
from bireme.server.tools.moved_schema import moved
from bireme.server.tools.parsers import BareCalls, FirstCall, NamedCall, ToolParser, parser_of


@dataclass(frozen=True)
class ToolUse:
    """`shown` are the tools as the chat template sees them; `parser` is None where the text is text."""

    shown: list[dict[str, Any]] | None = None
    structure: StructuredOutputsParams | None = None
    parser: Callable[[], ToolParser] | None = None
    is_named: bool = False


def tool_use(request: ChatCompletionRequest, style: str | None) -> ToolUse:
    """RequestError or ApiError for a choice that cannot be; `style` is how the model writes calls by itself."""
    tools: Sequence[Tool] = request.tools or []
    choice = request.tool_choice or ("auto" if tools else "none")
    if choice == "none":
        return ToolUse()
    if isinstance(choice, AllowedTools):
        allowed = choice.allowed_tools
        tools, choice = [_named(tools, it.function.name) for it in allowed.tools], allowed.mode
    if not tools:
        raise RequestError("tool_choice needs tools; name at least one")
    shown = [tool.model_dump(exclude_none=True) for tool in tools]
    names = {tool.function.name for tool in tools}
    if choice == "auto":
        if style is None:
            raise RequestError(
                "tool_choice auto: it is not known how this model writes calls; start the server "
                "with --tool-call-parser, or use tool_choice required"
            )
        is_single = request.parallel_tool_calls is False
        return ToolUse(
            shown,
            None,
            lambda: FirstCall(parser_of(style, names)) if is_single else parser_of(style, names),
        )
    if isinstance(choice, NamedTool):
        tool = _named(tools, choice.function.name)
        structure = StructuredOutputsParams(json=_parameters(tool))
        return ToolUse(shown, structure, lambda: NamedCall(tool.function.name), is_named=True)
    schema = _schema_of_calls(tools, is_single=request.parallel_tool_calls is False)
    structure = StructuredOutputsParams(json=schema)
    return ToolUse(shown, structure, lambda: BareCalls(names, is_list=True))


def _named(tools: Sequence[Tool], name: str) -> Tool:
    for tool in tools:
        if tool.function.name == name:
            return tool
    known = ", ".join(tool.function.name for tool in tools) or "none"
    raise RequestError(f"tool_choice names {name!r:.80}, and the tools are {known:.200}")


def _parameters(tool: Tool) -> dict[str, Any]:
    """A tool without parameters takes none."""
    return tool.function.parameters or {
        "type": "object",
        "properties": {},
        "additionalProperties": False,
    }


def _schema_of_calls(tools: Sequence[Tool], *, is_single: bool) -> dict[str, Any]:
    """A list of calls; each tool's schema is a definition, by the tool's number."""
    places = [f"#/$defs/{number}" for number in range(len(tools))]
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "parameters": {"$ref": place}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for tool, place in zip(tools, places, strict=True)
    ]
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if is_single:
        schema["maxItems"] = 1
    schema["$defs"] = {
        str(number): moved(_parameters(tool), place)
        for number, (tool, place) in enumerate(zip(tools, places, strict=True))
    }
    return schema
