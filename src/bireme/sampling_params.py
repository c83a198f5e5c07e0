"""How a request's tokens are chosen, and when it ends: vLLM's names, refused before they reach a rank."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from bireme.errors import RequestError

MAX_INT64 = 2**63 - 1
MAX_SEED = MAX_INT64
MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_LOGIT_BIAS = 1024
MAX_STOPS = 64
MAX_STOP_TOKEN_IDS = 1024
MAX_TEXTS = 1024  # of a structured choice
MAX_TEMPERATURE = 100
LONGEST_STOP = 1024  # characters


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What the text must match: exactly one of these. `json` is a schema, kept as text; `grammar` is
    Lark or GBNF.

    `json_object` asks for any JSON object.
    """

    json: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        given = [
            item.name for item in fields(self) if getattr(self, item.name) not in (None, False)
        ]
        if len(given) != 1:
            named = ", ".join(given) or "none"
            raise RequestError(
                f"structured outputs name {named}; give exactly one of json, regex, choice, grammar "
                "and json_object"
            )
        value = getattr(self, given[0])
        if not _STRUCTURES[given[0]](value):
            raise RequestError(
                f"structured outputs: {given[0]}={value!r:.60} is not what is needed"
            )
        if isinstance(self.json, Mapping | bool):
            object.__setattr__(self, "json", _as_json(self.json))
        texts = [value] if isinstance(value, str) else self.choice or ()
        if not all(map(is_unicode, texts)):
            raise RequestError(f"structured outputs: {given[0]} holds half of a surrogate pair")


def _as_json(schema: Mapping[str, Any] | bool) -> str:
    try:
        return json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"structured outputs: json is no JSON schema: {error}") from None


def is_unicode(text: str) -> bool:
    """False where half of a surrogate pair stands alone, which no encoding can say."""
    return text.encode(errors="replace").decode() == text


_STRUCTURES: dict[str, Callable[[Any], bool]] = {
    "json": lambda value: isinstance(value, str | Mapping | bool),
    "regex": lambda value: isinstance(value, str),
    "choice": lambda value: (
        isinstance(value, list | tuple)
        and 0 < len(value) <= MAX_TEXTS
        and all(isinstance(item, str) and item for item in value)
    ),
    "grammar": lambda value: isinstance(value, str),
    "json_object": lambda value: value is True,
}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. temperature 0 is greedy; `seed` None draws one for the request.

    `stop_token_ids` and `stop` end a request beside the model's own end; what ended it never shows in
    the text unless `include_stop_str_in_output`. `logprobs` k gives the chosen token's
    log-probability and the k likeliest ones, before temperature, penalties and masks;
    `prompt_logprobs` the same of the prompt.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    min_tokens: int = 0
    max_tokens: int = 16
    ignore_eos: bool = False
    stop: str | Sequence[str] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        for name, kinds, fits, needed in _RULES:
            value = getattr(self, name)
            is_flag = isinstance(value, bool) and kinds is not bool
            if is_flag or not isinstance(value, kinds) or not fits(value):
                raise RequestError(f"{name}={value!r:.80} must be {needed}")
        if self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}; "
                "use at most as many"
            )
        if not isinstance(self.stop, str):
            object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))

    @property
    def is_greedy(self) -> bool:
        """Below 1e-5 (as in vLLM) the likeliest token is drawn anyway, and logits would overflow."""
        return self.temperature < 1e-5

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def has_penalties(self) -> bool:
        return (
            self.repetition_penalty != 1
            or self.frequency_penalty != 0
            or self.presence_penalty != 0
        )


def _are_stops(value: str | Sequence[str]) -> bool:
    stops = [value] if isinstance(value, str) else list(value)
    return len(stops) <= MAX_STOPS and all(
        isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP and is_unicode(stop)
        for stop in stops
    )


def _is_bias(value: Mapping[Any, Any] | None) -> bool:
    if value is None:
        return True
    return len(value) <= MAX_LOGIT_BIAS and all(
        type(id_) is int and type(bias) in (int, float) and -100 <= bias <= 100
        for id_, bias in value.items()
    )


def _is_count(value: int | None, most: int) -> bool:
    return value is None or 0 <= value <= most


_NUMBER = int | float
_PENALTY = "a number from -2 to 2"
_LOGPROBS = f"a whole number from 0 to {MAX_LOGPROBS}"

# name, type, what fits, and that in words
_RULES: tuple[tuple[str, Any, Callable[[Any], bool], str], ...] = (
    ("n", int, lambda n: 1 <= n <= MAX_CHOICES, f"a whole number from 1 to {MAX_CHOICES}"),
    (
        "temperature",
        _NUMBER,
        lambda t: 0 <= t <= MAX_TEMPERATURE,
        f"a number from 0 to {MAX_TEMPERATURE}; 0 is greedy",
    ),
    (
        "top_k",
        int,
        lambda k: 0 <= k <= MAX_INT64,
        "a whole number from 0 to 2**63 - 1; 0 keeps every token",
    ),
    ("top_p", _NUMBER, lambda p: 0 < p <= 1, "a number above 0 and at most 1"),
    ("min_p", _NUMBER, lambda p: 0 <= p <= 1, "a number from 0 to 1"),
    ("repetition_penalty", _NUMBER, lambda p: 0.01 <= p <= 100, "a number from 0.01 to 100"),
    ("frequency_penalty", _NUMBER, lambda p: -2 <= p <= 2, _PENALTY),
    ("presence_penalty", _NUMBER, lambda p: -2 <= p <= 2, _PENALTY),
    (
        "logit_bias",
        Mapping | None,
        _is_bias,
        f"at most {MAX_LOGIT_BIAS} token ids, each with a number from -100 to 100",
    ),
    ("max_tokens", int, lambda n: 1 <= n <= MAX_INT64, "a whole number from 1 to 2**63 - 1"),
    ("min_tokens", int, lambda n: 0 <= n <= MAX_INT64, "a whole number from 0 to 2**63 - 1"),
    (
        "seed",
        int | None,
        lambda s: s is None or 0 <= s <= MAX_SEED,
        "a whole number from 0 to 2**63 - 1",
    ),
    ("ignore_eos", bool, lambda _: True, "true or false"),
    ("include_stop_str_in_output", bool, lambda _: True, "true or false"),
    (
        "stop_token_ids",
        Collection,
        lambda ids: (
            not isinstance(ids, str)
            and len(ids) <= MAX_STOP_TOKEN_IDS
            and all(type(id_) is int for id_ in ids)
        ),
        f"at most {MAX_STOP_TOKEN_IDS} token ids, each a whole number",
    ),
    (
        "stop",
        str | list | tuple,
        _are_stops,
        f"a text, or up to {MAX_STOPS} of them, of 1 to {LONGEST_STOP} characters each",
    ),
    ("logprobs", int | None, lambda k: _is_count(k, MAX_LOGPROBS), _LOGPROBS),
    ("prompt_logprobs", int | None, lambda k: _is_count(k, MAX_LOGPROBS), _LOGPROBS),
    (
        "structured_outputs",
        StructuredOutputsParams | None,
        lambda _: True,
        "StructuredOutputsParams",
    ),
)
