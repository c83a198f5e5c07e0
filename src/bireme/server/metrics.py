"""What a server counts, for Prometheus: vLLM's names, labels and buckets (of waiting more), under `bireme:`.

What the server sees, requests and their tokens, is counted here as it happens; what the engine
counts is taken from its `Stats` when somebody asks. Kept by names without a prefix, which is put
before them at the end: so a second prefix costs nothing while tokens come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from bireme.engine.service_messages import Stats
from bireme.observe.told import ToldLedger
from bireme.outputs import Delta
from bireme.server.engine_families import engine_families, ledger_families
from bireme.server.finished import FinishedRequest

PREFIX = "bireme"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FINISHED_REASONS = ("stop", "length", "abort", "timeout", "error")

_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_BETWEEN_TOKENS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
_REQUEST_S = (  # vLLM's from 0.3 on: to wait for less is what is usual
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0,
    20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_NUM_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))

_HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": ("Seconds from arrival to the first token.", _FIRST_TOKEN_S),
    "inter_token_latency_seconds": (
        "Seconds between tokens of a choice that came one after the other.",
        _BETWEEN_TOKENS_S,
    ),
    "e2e_request_latency_seconds": ("Seconds from arrival to the last token.", _REQUEST_S),
    "request_queue_time_seconds": ("Seconds from arrival to the first step.", _REQUEST_S),
    "request_prompt_tokens": ("Prompt tokens of a request that has ended.", _NUM_TOKENS),
    "request_generation_tokens": ("Tokens that a request that has ended got.", _NUM_TOKENS),
}
_COUNTERS: dict[str, tuple[str, ...]] = {  # what it is, and labels of its own
    "prompt_tokens": ("Prompt tokens of requests that got a token.",),
    "generation_tokens": ("Tokens that were generated.",),
    "request_success": ("Requests that have ended.", "finished_reason"),
    "http_requests": ("HTTP requests that were answered.", "method", "handler", "status"),
}


class ServerMetrics:
    """Counts of one server, in a registry of its own; from one thread.

        watch = metrics.begin(opened.stream.num_prompt_tokens, opened.stream.arrival_s)
        watch.note_tokens(delta)  # each, as it comes
        metrics.note_finished(FinishedRequest.of(output))
        body, content_type = metrics.render(await client.stats())

    Every metric appears under `bireme:` and under each of `aliases`.
    """

    def __init__(self, model_name: str, *, aliases: Sequence[str] = ()) -> None:
        self.labels = {"model_name": model_name, "engine": "0"}
        self._own = CollectorRegistry()
        self._stats: Stats | None = None
        self._ledger: ToldLedger | None = None
        self._observe = {
            name: Histogram(name, told, [*self.labels], buckets=buckets, registry=self._own).labels(
                **self.labels
            )
            for name, (told, buckets) in _HISTOGRAMS.items()
        }
        self.first_token_s = self._observe["time_to_first_token_seconds"]
        self.between_tokens_s = self._observe["inter_token_latency_seconds"]
        counters = {
            name: Counter(name, told, [*self.labels, *more], registry=self._own)
            for name, (told, *more) in _COUNTERS.items()
        }
        self.prompt_tokens = counters["prompt_tokens"].labels(**self.labels)
        self.generation_tokens = counters["generation_tokens"].labels(**self.labels)
        self._responses = counters["http_requests"]
        self._ended = {
            reason: counters["request_success"].labels(**self.labels, finished_reason=reason)
            for reason in FINISHED_REASONS
        }
        self._registry = CollectorRegistry()
        self._registry.register(_Prefixed(self._families, (PREFIX, *aliases)))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

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

    def note_response(self, method: str, handler: str, status: int) -> None:
        """Once an HTTP request. `handler` is the route, not the path: paths are without number."""
        self._responses.labels(
            **self.labels, method=method, handler=handler, status=str(status)
        ).inc()

    def render(self, stats: Stats | None, ledger: ToldLedger | None = None) -> tuple[bytes, str]:
        """Everything, and its content type; `stats` None: the engine is not ready."""
        self._stats, self._ledger = stats, ledger
        return generate_latest(self._registry), CONTENT_TYPE

    def _families(self) -> Iterator[Metric]:
        yield from engine_families(self._stats, self.labels)
        if self._ledger is not None:
            yield from ledger_families(self._ledger, self.labels)
        yield from self._own.collect()


class RequestWatch:
    """One request on its way: what its deltas say of time and tokens."""

    __slots__ = ("_arrival_s", "_last_s", "_metrics", "_num_prompt_tokens")

    def __init__(self, metrics: ServerMetrics, num_prompt_tokens: int, arrival_s: float) -> None:
        self._metrics, self._num_prompt_tokens = metrics, num_prompt_tokens
        self._arrival_s = arrival_s
        self._last_s: dict[int, float] = {}  # by choice

    def note_tokens(self, delta: Delta) -> None:
        """Of every delta, in their order; those without tokens say nothing."""
        if not delta.token_ids:
            return
        metrics, now_s = self._metrics, delta.time_s
        metrics.generation_tokens.inc(len(delta.token_ids))
        if (before_s := self._last_s.get(delta.choice)) is not None:
            metrics.between_tokens_s.observe(now_s - before_s)
        elif not self._last_s:
            metrics.first_token_s.observe(now_s - self._arrival_s)
            metrics.prompt_tokens.inc(self._num_prompt_tokens)
        self._last_s[delta.choice] = now_s


class _Prefixed(Collector):
    """The same families under each prefix, without the times at which counters were made."""

    def __init__(self, families: Callable[[], Iterator[Metric]], prefixes: Sequence[str]) -> None:
        self._families, self._prefixes = families, prefixes

    def collect(self) -> Iterator[Metric]:
        families = list(self._families())
        for prefix in self._prefixes:
            for family in families:
                named = Metric(f"{prefix}:{family.name}", family.documentation, family.type)
                named.samples = [
                    sample._replace(name=f"{prefix}:{sample.name}")
                    for sample in family.samples
                    if not sample.name.endswith("_created")
                ]
                yield named
