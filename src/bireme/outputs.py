"""What a caller gets back (vLLM's names of classes and fields)."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec


@dataclass(frozen=True, slots=True)
class Logprob:
    """Of one token at one place: its log-probability, its rank (1 is the likeliest), its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


Logprobs = dict[int, Logprob]  # the chosen token first, then the likeliest


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One continuation of a prompt."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[Logprobs] | None = None
    cumulative_logprob: float | None = None


@dataclass(frozen=True, kw_only=True)
class RequestMetrics:
    """Seconds on the monotonic clock, from arrival: `ttft_s` to the first token, `queue_s` of it to its
    first step, or to its end where it had none."""

    ttft_s: float
    e2e_s: float
    num_tokens: int
    queue_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.e2e_s if self.e2e_s else 0.0


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A prompt and its continuations. `prompt_logprobs` begins with None: nothing comes before the
    first token."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    prompt_logprobs: list[Logprobs | None] | None = None
    num_cached_tokens: int = 0


class Delta(msgspec.Struct, frozen=True):
    """New text of continuation `choice` of prompt `index`; `output` is set with the last piece of its
    last continuation. `time_s`, of the engine's clock, is when the engine had it."""

    index: int
    text: str
    token_ids: list[int]
    output: RequestOutput | None
    choice: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[Logprobs] = msgspec.field(default_factory=list)
    time_s: float = 0.0


class TokenGaps:
    """Inter-token latency: the time between tokens of a continuation that came one after the other."""

    __slots__ = ("_last_s",)

    def __init__(self) -> None:
        self._last_s: dict[tuple[int, int], float] = {}  # by prompt and choice

    @property
    def has_begun(self) -> bool:
        """True once there was a token."""
        return bool(self._last_s)

    def note(self, delta: Delta) -> float | None:
        """Seconds since the tokens before; None for the first, and where a delta has no token."""
        if not delta.token_ids:
            return None
        key = delta.index, delta.choice
        before_s, self._last_s[key] = self._last_s.get(key), delta.time_s
        return None if before_s is None else delta.time_s - before_s
