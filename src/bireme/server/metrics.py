"""What a server of a language model counts: vLLM's names, labels and buckets (of waiting more)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import Metric

from bireme.engine.service_messages import Stats
from bireme.outputs import Delta, TokenGaps
from bireme.server.engine_families import engine_families
from bireme.server.finished import FinishedRequest
from bireme.server.metrics_base import REQUEST_S, Metrics

FINISHED_REASONS = ("stop", "length", "abort", "timeout", "error")

_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_BETWEEN_TOKENS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
_NUM_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))

_HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": ("Seconds from arrival to the first token.", _FIRST_TOKEN_S),
    "inter_token_latency_seconds": (
        "Seconds between tokens of a choice that came one after the other.",
        _BETWEEN_TOKENS_S,
    ),
    "e2e_request_latency_seconds": ("Seconds from arrival to the last token.", REQUEST_S),
    "request_queue_time_seconds": ("Seconds from arrival to the first step.", REQUEST_S),
    "request_prompt_tokens": ("Prompt tokens of a request that has ended.", _NUM_TOKENS),
    "request_generation_tokens": ("Tokens that a request that has ended got.", _NUM_TOKENS),
}
_COUNTERS: dict[str, tuple[str, ...]] = {  # what it is, and labels of its own
    "prompt_tokens": ("Prompt tokens of requests that got a token.",),
    "generation_tokens": ("Tokens that were generated.",),
    "request_success": ("Requests that have ended.", "finished_reason"),
}


class ServerMetrics(Metrics[Stats]):
    """From one thread:

    watch = metrics.begin(opened.stream.num_prompt_tokens, opened.stream.arrival_s)
    watch.note_tokens(delta)  # each, as it comes
    metrics.note_finished(FinishedRequest.of(output))
    body, content_type = metrics.render(await client.stats())
    """

    def __init__(self, model_name: str, *, aliases: Sequence[str] = ()) -> None:
        super().__init__(model_name, _HISTOGRAMS, aliases)
        self.first_token_s = self._observe["time_to_first_token_seconds"]
        self.between_tokens_s = self._observe["inter_token_latency_seconds"]
        counters = {
            name: self._counter(name, told, *more) for name, (told, *more) in _COUNTERS.items()
        }
        self.prompt_tokens = counters["prompt_tokens"].labels(**self.labels)
        self.generation_tokens = counters["generation_tokens"].labels(**self.labels)
        self._ended = {
            reason: counters["request_success"].labels(**self.labels, finished_reason=reason)
            for reason in FINISHED_REASONS
        }

    def _engine_families(self, stats: Stats | None) -> Iterator[Metric]:
        return engine_families(stats, self.labels)

    def begin(self, num_prompt_tokens: int, arrival_s: float) -> RequestWatch:
        """A request that the engine will be asked; `arrival_s` is of the monotonic clock."""
        return RequestWatch(self, num_prompt_tokens, arrival_s)

    def note_finished(self, request: FinishedRequest) -> None:
        """Once a request, however it ended."""
        reason = request.finished_reason
        self._ended[reason if reason in self._ended else "error"].inc()
        observe = self._observe
        observe["e2e_request_latency_seconds"].observe(request.e2e_s)
        observe["request_queue_time_seconds"].observe(request.queue_s)
        observe["request_prompt_tokens"].observe(request.num_prompt_tokens)
        observe["request_generation_tokens"].observe(request.num_generation_tokens)


class RequestWatch:
    """One request on its way: what its deltas say of time and tokens."""

    __slots__ = ("_arrival_s", "_gaps", "_metrics", "_num_prompt_tokens")

    def __init__(self, metrics: ServerMetrics, num_prompt_tokens: int, arrival_s: float) -> None:
        self._metrics, self._num_prompt_tokens = metrics, num_prompt_tokens
        self._arrival_s, self._gaps = arrival_s, TokenGaps()

    def note_tokens(self, delta: Delta) -> None:
        """Of every delta, in their order; those without tokens say nothing."""
        if not delta.token_ids:
            return
        metrics, is_first = self._metrics, not self._gaps.has_begun
        metrics.generation_tokens.inc(len(delta.token_ids))
        if (gap_s := self._gaps.note(delta)) is not None:
            metrics.between_tokens_s.observe(gap_s)
        elif is_first:
            metrics.first_token_s.observe(delta.time_s - self._arrival_s)
            metrics.prompt_tokens.inc(self._num_prompt_tokens)
