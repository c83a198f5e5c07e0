"""`/v1/responses`, of which nothing is stored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from bireme.server.protocol.chat import ContentPart, TokenLogprob
from bireme.server.protocol.common import (
    Fields,
    Listed,
    MinP,
    NumLogprobs,
    NumTokens,
    Objects,
    Priority,
    RepetitionPenalty,
    Sent,
    Temperature,
    TopK,
    TopP,
    told,
)

MAX_METADATA = 16


class InputItem(Fields):
    """A message, a call that was made, or what it brought."""

    type: str | None = None
    role: str | None = None
    content: str | Objects[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | Objects[ContentPart] | None = None


class ResponseTool(Fields):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedResponseTool(Fields):
    type: Literal["function"]
    name: str


class AllowedResponseTools(Fields):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Objects[NamedResponseTool]


class TextFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextSettings(Fields):
    format: TextFormat | None = None


class ResponsesRequest(Fields):
    """`input` is a text, or the items of a conversation."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"input": "Hello", "max_output_tokens": 16}]}
    )

    model: str | None = None
    input: str | Annotated[Objects[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: NumTokens = None
    temperature: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    min_p: MinP = None
    repetition_penalty: RepetitionPenalty = None
    seed: int | None = None
    top_logprobs: NumLogprobs = None
    include: Listed[str] | None = None
    text: TextSettings | None = None
    tools: Objects[ResponseTool] | None = None
    tool_choice: (
        Literal["none", "auto", "required"] | NamedResponseTool | AllowedResponseTools | None
    ) = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    store: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    metadata: Annotated[
        dict[str, Any] | None,
        told(maxProperties=MAX_METADATA, additionalProperties={"type": "string"}),
    ] = None
    priority: Priority = None
    user: str | None = None


class OutputText(Sent):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class OutputMessage(Sent):
    id: str
    type: Literal["message"]
    status: str
    role: Literal["assistant"]
    content: list[OutputText]


class OutputCall(Sent):
    id: str
    type: Literal["function_call"]
    status: str
    call_id: str
    name: str
    arguments: str


class InputDetails(Sent):
    cached_tokens: int


class OutputDetails(Sent):
    reasoning_tokens: int


class ResponseUsage(Sent):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(Sent):
    reason: str


class ResponseError(Sent):
    code: str
    message: str


class ModelResponse(Sent):
    """An answer, or with `stream` the last of many events."""

    id: str
    object: Literal["response"]
    created_at: float
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: None
    store: Literal[False]
    temperature: float | None
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float | None
    truncation: Literal["disabled"]
    usage: ResponseUsage | None


class Event(Sent):
    """One of a stream; its further fields are those of its type."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int
