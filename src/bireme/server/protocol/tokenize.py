"""`/tokenize`, `/detokenize`, `/tokenizer_info` (vLLM's)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from bireme.server.protocol.chat import ChatMessage, Tool, Variables
from bireme.server.protocol.common import Fields, Listed, Objects, Sent, TokenId


def _is_given(name: str, kind: str) -> dict[str, Any]:
    return {"required": [name], "properties": {name: {"type": kind}}}


class TokenizeRequest(Fields):
    """A `prompt`, or the `messages` of a conversation."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"prompt": "import "}],
            "oneOf": [_is_given("prompt", "string"), _is_given("messages", "array")],
        }
    )

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[Objects[ChatMessage] | None, Field(min_length=1)] = None
    tools: Objects[Tool] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: Variables | None = None


class TokenizeResponse(Sent):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Fields):
    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [5, 6]}]})

    model: str | None = None
    tokens: Listed[TokenId]


class DetokenizeResponse(Sent):
    prompt: str


class TokenizerInfo(Sent):
    """With the special tokens that there are: `bos_token` and its like."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, str]

    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    chat_template: str | None
