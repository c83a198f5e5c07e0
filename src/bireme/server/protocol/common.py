"""What several routes share: strict types, sampling fields, usage, errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from bireme.errors import RequestError
from bireme.request import MAX_PRIORITY
from bireme.sampling_params import (
    LONGEST_STOP,
    MAX_CHOICES,
    MAX_INT64,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_SEED,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
    MAX_TEMPERATURE,
    SamplingParams,
    StructuredOutputsParams,
)

MAX_FIELDS = 256  # of one object
MAX_OBJECTS = 4096  # of one list


class Fields(BaseModel):
    """What a client sends: types are not guessed ("1" is no number), further fields are accepted."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, given: Any) -> Any:
        if isinstance(given, dict) and len(given) > MAX_FIELDS:
            raise PydanticCustomError(
                "too_many_fields",
                "{given} fields are too many; send at most {most}",
                {"given": len(given), "most": MAX_FIELDS},
            )
        return given


class Sent(BaseModel):
    """What a client is sent: the fields that were set, so that absent and null differ."""

    model_config = ConfigDict(protected_namespaces=())

    def as_json(self) -> bytes:
        return self.__pydantic_serializer__.to_json(self, exclude_unset=True)


def told(**keywords: Any) -> Any:
    """Bounds for OpenAPI alone: `SamplingParams` and the engine check them, in their own words."""
    return Field(json_schema_extra=keywords)


T = TypeVar("T")
# An error for the first item that is wrong, not for each of a million.
Listed = Annotated[list[T], Field(fail_fast=True)]
# Of objects, each of which costs microseconds.
Objects = Annotated[list[T], Field(fail_fast=True, max_length=MAX_OBJECTS)]

TokenId = Annotated[int, told(minimum=0)]
_Stop = Annotated[str, told(minLength=1, maxLength=LONGEST_STOP)]

Temperature = Annotated[float | None, told(minimum=0, maximum=MAX_TEMPERATURE)]
TopP = Annotated[float | None, told(exclusiveMinimum=0, maximum=1)]
TopK = Annotated[int | None, told(minimum=-1, maximum=MAX_INT64)]
MinP = Annotated[float | None, told(minimum=0, maximum=1)]
Penalty = Annotated[float | None, told(minimum=-2, maximum=2)]
RepetitionPenalty = Annotated[float | None, told(minimum=0.01, maximum=100)]
NumTokens = Annotated[int | None, told(minimum=1, maximum=MAX_INT64)]
NumLogprobs = Annotated[int | None, told(minimum=0, maximum=MAX_LOGPROBS)]
Priority = Annotated[int | None, told(minimum=-MAX_PRIORITY, maximum=MAX_PRIORITY)]


class StreamOptions(Fields):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(Fields):
    name: str
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Fields):
    """Exactly one of these."""

    json_: Annotated[str | dict[str, Any] | bool | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Listed[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def as_params(self) -> StructuredOutputsParams:
        return StructuredOutputsParams(
            json=self.json_,
            regex=self.regex,
            choice=self.choice,
            grammar=self.grammar,
            json_object=self.json_object,
        )


_NAMES = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
)


class SamplingFields(Fields):
    """How tokens are chosen; what is left out or null has the model's default."""

    model: str | None = None
    n: Annotated[int | None, told(minimum=1, maximum=MAX_CHOICES)] = None
    temperature: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    min_p: MinP = None
    frequency_penalty: Penalty = None
    presence_penalty: Penalty = None
    repetition_penalty: RepetitionPenalty = None
    logit_bias: Annotated[
        dict[str, Any] | None,
        told(
            maxProperties=MAX_LOGIT_BIAS,
            additionalProperties={"type": "number", "minimum": -100, "maximum": 100},
        ),
    ] = None
    seed: int | None = None
    stop: Annotated[_Stop | Listed[_Stop] | None, told(maxItems=MAX_STOPS)] = None
    stop_token_ids: Annotated[Listed[TokenId] | None, told(maxItems=MAX_STOP_TOKEN_IDS)] = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int | None, told(minimum=0, maximum=MAX_INT64)] = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: Priority = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    user: str | None = None

    def sampling_params(self, defaults: Mapping[str, Any], **settings: Any) -> SamplingParams:
        """RequestError for what cannot be; `settings` are further fields of `SamplingParams`."""
        given = {name: getattr(self, name) for name in _NAMES}
        given = {name: value for name, value in given.items() if value is not None}
        if given.get("top_k") == -1:  # vLLM's other way to say: of all
            given["top_k"] = 0
        if self.seed is not None:
            given["seed"] = self.seed % (MAX_SEED + 1)
        if self.logit_bias is not None:
            given["logit_bias"] = {_as_id(key): bias for key, bias in self.logit_bias.items()}
        settings.setdefault("structured_outputs", self._structured())
        return SamplingParams(**{**defaults, **given, **settings})

    @property
    def structure_field(self) -> str:
        """The one that asks for a structured output, if one does."""
        return "response_format" if self.structured_outputs is None else "structured_outputs"

    def _structured(self) -> StructuredOutputsParams | None:
        if self.structured_outputs is not None:
            return self.structured_outputs.as_params()
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return StructuredOutputsParams(json_object=True)
        if wanted.json_schema is None:
            raise RequestError(
                "response_format json_schema needs a json_schema; give it beside type"
            )
        schema = wanted.json_schema.schema_
        return StructuredOutputsParams(json={} if schema is None else schema)


def _as_id(text: str) -> int | str:
    """A text that is no id is left for SamplingParams to refuse."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else text


class PromptTokensDetails(Sent):
    cached_tokens: int


class Usage(Sent):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, num_prompt: int, num_completion: int, num_cached: int) -> Usage:
        return cls(
            prompt_tokens=num_prompt,
            completion_tokens=num_completion,
            total_tokens=num_prompt + num_completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached),
        )


class ErrorInfo(Sent):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Sent):
    error: ErrorInfo


class Health(Sent):
    """`doing` while the model loads, `error` where it broke."""

    status: Literal["ready", "loading", "not started", "broken", "shutting down"]
    doing: str | None = None
    error: str | None = None


class ModelCard(Sent):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(Sent):
    object: Literal["list"]
    data: list[ModelCard]


class Version(Sent):
    version: str


class RankSetup(Sent):
    """A rank, where it runs, and the threads of one on a CPU."""

    name: str
    stage: int
    tp_rank: int
    device: str
    num_threads: int


class RunSetup(Sent):
    """How the model runs. `num_requests` of the longest length fit the KV cache at once."""

    model: str
    folder: str | None
    dtype: str
    transport: str
    ranks: list[RankSetup]
    num_cores: int
    environment: dict[str, str]
    num_requests: float | None


class LedgerRank(Sent):
    """`shares` of the time by row, `late` by the rank that was waited for, `overlapped` the share in which a
    send went on beside a later step's work, and the time as a line."""

    name: str
    stage: int
    shares: dict[str, float]
    late: dict[str, float]
    overlapped: float
    line: str


class Ledger(Sent):
    """Of `seconds`, until `until_s` seconds ago."""

    seconds: float
    until_s: float
    ranks: list[LedgerRank]


class LedgerBars(Sent):
    """A rank's last steps: bars of [start us, end us, row of the ledger, step or null]."""

    name: str
    stage: int
    bars: list[tuple[int, int, str, int | None]]


class LedgerGantt(Sent):
    """Of `num_steps`. Before `whole_us` there is a bar a row in each `column_us`, as long as all of that row in it."""

    seconds: float
    ranks: list[LedgerBars]
    num_steps: int
    whole_us: int
    column_us: int


class LiveLedger(Ledger):
    gantt: LedgerGantt | None


class LiveRank(Sent):
    name: str
    stage: int
    tp_rank: int
    device: str


class LiveServer(Sent):
    """What is served, where; `created`: when the server began, in seconds since 1970; `can_chat`:
    /v1/chat/completions answers."""

    version: str
    created: int
    models: list[str]
    can_chat: bool
    ranks: list[LiveRank]
    told: list[str]


class LiveHistogram(Sent):
    """How many were at most each bound, and all; their sum."""

    bounds: list[float]
    counts: list[float]
    sum: float


class LiveCounts(Sent):
    """Named as in /metrics, without its prefix."""

    counters: dict[str, float]
    histograms: dict[str, LiveHistogram]


class Moment(Sent):
    """`time_s` since 1970; `failed_rank` where one broke; `stats` are the engine's counts, null while it
    does not answer, as the ledger is."""

    time_s: float
    health: Health
    failed_rank: str
    server: LiveServer
    num_active: int
    stats: dict[str, Any] | None
    ledger: LiveLedger | None
    counts: LiveCounts


class Load(Sent):
    """As vLLM names it."""

    server_load: int
