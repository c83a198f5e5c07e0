"""What the sender of a request saw of its answer. Plain numbers; seconds on a monotonic clock."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field


def _no_gaps() -> array[float]:
    return array("d")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """`ttft_s` and `latency_s` count from sending to the first and the last piece of the answer;
    `itls` are the gaps between pieces, 8 bytes each. An `error` says why there is no whole answer."""

    num_input_tokens: int
    num_output_tokens: int = 0
    ttft_s: float = 0.0
    latency_s: float = 0.0
    itls: array[float] = field(default_factory=_no_gaps)
    text: str = ""
    error: str = ""

    @property
    def tpot_s(self) -> float | None:
        """Per output token behind the first; None where the first was all."""
        if self.num_output_tokens < 2:
            return None
        return (self.latency_s - self.ttft_s) / (self.num_output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Sent:
    """An answer, and when its request went out.

    start              due          ready          sent                  last piece
      |-----------------|-- lag_s ---|-- queue_s ---|----- latency_s -------|
      |------------------- sent_s ------------------|

    `lag_s` is the generator's own lateness, `queue_s` the wait for one of `max_concurrency` places.
    """

    index: int
    sent_s: float
    lag_s: float
    queue_s: float
    answer: Answer
