"""`/v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from bireme.server.protocol.common import (
    MAX_FIELDS,
    Fields,
    NumLogprobs,
    NumTokens,
    Objects,
    SamplingFields,
    Sent,
    Usage,
)

# Of a chat template.
Variables = Annotated[dict[str, Any], Field(max_length=MAX_FIELDS)]

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]


class ContentPart(Fields):
    """A piece of a message; only text is understood."""

    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(Fields):
    name: str
    arguments: str


class ToolCall(Fields):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Fields):
    role: Role
    content: str | Objects[ContentPart] | None = None
    name: str | None = None
    tool_calls: Objects[ToolCall] | None = None
    tool_call_id: str | None = None


class FunctionDefinition(Fields):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Fields):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Fields):
    name: str


class NamedTool(Fields):
    type: Literal["function"]
    function: NamedFunction


class AllowedSet(Fields):
    mode: Literal["auto", "required"]
    tools: Objects[NamedTool]


class AllowedTools(Fields):
    """The mode as if there were no other tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedSet


class ChatCompletionRequest(SamplingFields):
    """A conversation to go on with."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16}]
        }
    )

    messages: Annotated[Objects[ChatMessage], Field(min_length=1)]
    max_tokens: NumTokens = None
    max_completion_tokens: NumTokens = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs = None
    prompt_logprobs: NumLogprobs = None
    tools: Objects[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Variables | None = None


class TopLogprob(Sent):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Sent):
    content: list[TokenLogprob]


class CalledFunction(Sent):
    name: str
    arguments: str


class MadeToolCall(Sent):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(Sent):
    role: Literal["assistant"]
    content: str | None
    tool_calls: list[MadeToolCall] | None = None


class ChatChoice(Sent):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatCompletion(Sent):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    prompt_token_ids: list[int] | None = None


class FunctionDelta(Sent):
    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(Sent):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChoiceDelta(Sent):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Sent):
    index: int
    delta: ChoiceDelta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(Sent):
    """One piece of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
