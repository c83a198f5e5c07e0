"""`/v1/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from bireme.sampling_params import MAX_INT64
from bireme.server.protocol.common import (
    Listed,
    NumLogprobs,
    SamplingFields,
    Sent,
    TokenId,
    Usage,
    told,
)

MAX_PROMPTS = 1024


class CompletionRequest(SamplingFields):
    """`prompt` is a text, token ids, or a list of either."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "import ", "max_tokens": 16}]}
    )

    prompt: Annotated[
        str | Listed[TokenId] | Listed[str | Listed[TokenId]], told(minLength=1, minItems=1)
    ]
    max_tokens: Annotated[int | None, told(minimum=0, maximum=MAX_INT64)] = None
    echo: bool | None = None
    logprobs: NumLogprobs = None
    prompt_logprobs: NumLogprobs = None
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class CompletionLogprobs(Sent):
    text_offset: list[int]
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Sent):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class Completion(Sent):
    """An answer, or with `stream` one piece of it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = Field(default=None)
