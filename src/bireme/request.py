"""Requests, and the contract between the engine and what executes its steps.

The engine sends a `ScheduledBatch` to every rank; the last stage's first rank answers with a
`StepOutput`. Both carry (incarnation, step_id); ranks execute strictly in step_id order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from bireme.errors import RequestError

MAX_INT64 = 2**63 - 1
MAX_SEED = MAX_INT64


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen; vLLM's names. temperature 0 is greedy.

    `seed` None draws one for the request. `stop_token_ids` end a request beside the model's own.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 16
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, kinds, fits, needed in _RULES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kinds) or not fits(value):
                raise RequestError(f"{name}={value!r} must be {needed}")

    @property
    def is_greedy(self) -> bool:
        """Below 1e-5 (as in vLLM) the likeliest token is drawn anyway, and logits would overflow."""
        return self.temperature < 1e-5


# name, type, what fits, and that in words
_RULES: tuple[tuple[str, Any, Callable[[Any], bool], str], ...] = (
    (
        "temperature",
        int | float,
        lambda t: 0 <= t < math.inf,
        "a finite number, at least 0; 0 is greedy",
    ),
    (
        "top_k",
        int,
        lambda k: 0 <= k <= MAX_INT64,
        "a whole number from 0 to 2**63 - 1; 0 keeps every token",
    ),
    ("top_p", int | float, lambda p: 0 < p <= 1, "a number above 0 and at most 1"),
    ("max_tokens", int, lambda n: 1 <= n <= MAX_INT64, "a whole number from 1 to 2**63 - 1"),
    (
        "seed",
        int | None,
        lambda s: s is None or 0 <= s <= MAX_SEED,
        "a whole number from 0 to 2**63 - 1",
    ),
    (
        "stop_token_ids",
        Collection,
        lambda ids: all(type(id_) is int for id_ in ids),
        "token ids, each a whole number",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to continue, in ids. `eos_token_ids` is empty where they are to be ignored."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    eos_token_ids: frozenset[int] = frozenset()

    @property
    def max_len(self) -> int:
        """The longest length (tokens) that this request can reach."""
        return len(self.prompt_token_ids) + self.params.max_tokens


class SlotSetup(msgspec.Struct, frozen=True, array_like=True):
    """A request takes a slot: what the ranks must know of it for its whole life."""

    slot: int
    seed: int
    temperature: float
    top_k: int
    top_p: float
    max_len: int


class ScheduledPiece(msgspec.Struct, frozen=True, array_like=True):
    """Tokens [start, start + num_tokens) of one slot.

    `token_ids` None: the one token is the slot's last sampled id, which need not be known yet.
    `new_blocks` extend the slot's block table of each kind. `samples`: the piece's last token
    yields the slot's next id.
    """

    slot: int
    start: int
    num_tokens: int
    token_ids: list[int] | None
    new_blocks: list[list[int]]
    samples: bool


class ScheduledBatch(msgspec.Struct, frozen=True, array_like=True):
    """Tokens of many requests that go through all stages as one step."""

    incarnation: int
    step_id: int
    setups: list[SlotSetup]
    pieces: list[ScheduledPiece]

    @property
    def num_tokens(self) -> int:
        return sum(piece.num_tokens for piece in self.pieces)

    @property
    def sampling_slots(self) -> list[int]:
        return [piece.slot for piece in self.pieces if piece.samples]


class StepOutput(msgspec.Struct, frozen=True, array_like=True):
    """`token_ids[i]` are the new tokens (0, 1 or more) of slot `slots[i]`."""

    incarnation: int
    step_id: int
    slots: list[int]
    token_ids: list[list[int]]


class Executor(Protocol):
    """What runs scheduled batches: real workers, simulated devices, or a script."""

    @property
    def is_broken(self) -> bool:
        """True once it can neither submit nor collect any more."""
        ...

    def give_up(self) -> None:
        """Ends whatever runs the batches; what is in flight is lost."""
        ...

    def submit(self, batch: ScheduledBatch) -> None:
        """Starts a step; returns at once."""
        ...

    def collect(self) -> StepOutput:
        """The next step's output, in submission order. Raises EngineError when a rank failed."""
        ...


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One continuation of a prompt (vLLM's field names)."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, kw_only=True)
class RequestMetrics:
    """Seconds on the monotonic clock, from arrival; `ttft_s` is the time to the first token."""

    ttft_s: float
    e2e_s: float
    num_tokens: int

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.e2e_s if self.e2e_s else 0.0


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A prompt and its continuation (vLLM's field names)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
