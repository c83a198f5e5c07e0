"""Metrics for Prometheus, whatever is served.

What the server sees is counted here as it happens; what the engine counts is taken from what it says when
somebody asks. Kept by names without a prefix, which is put before them at the end: so a second prefix
costs nothing while requests are served.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import msgspec
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from bireme.observe.told import ToldLedger
from bireme.server.engine_families import ledger_families

PREFIX = "bireme"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REQUEST_S = (  # vLLM's from 0.3 on: to wait for less is what is usual
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0,
    20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip

S = TypeVar("S")


class ToldHistogram(msgspec.Struct, frozen=True):
    """`counts` of what was at most each bound, and of all at the end; `sum` of it."""

    bounds: list[float]
    counts: list[float]
    sum: float


class Counts(msgspec.Struct, frozen=True):
    """What the server counts itself, by the names of `/metrics` without a prefix: counters that have no
    labels of their own, and histograms."""

    counters: dict[str, float]
    histograms: dict[str, ToldHistogram]


class Metrics(ABC, Generic[S]):
    """Counts of one server, in a registry of its own; from one thread. `histograms` are what each is, and
    its buckets. Every metric appears under `bireme:` and under each of `aliases`."""

    def __init__(
        self,
        model_name: str,
        histograms: Mapping[str, tuple[str, Sequence[float]]],
        aliases: Sequence[str] = (),
    ) -> None:
        self.labels = {"model_name": model_name, "engine": "0"}
        self._own = CollectorRegistry()
        self._stats: S | None = None
        self._ledger: ToldLedger | None = None
        self._observe = {
            name: Histogram(name, told, [*self.labels], buckets=buckets, registry=self._own).labels(
                **self.labels
            )
            for name, (told, buckets) in histograms.items()
        }
        self._responses = self._counter(
            "http_requests", "HTTP requests that were answered.", "method", "handler", "status"
        )
        self._registry = CollectorRegistry()
        self._registry.register(_Prefixed(self._families, (PREFIX, *aliases)))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def _counter(self, name: str, told: str, *more: str) -> Counter:
        """With labels of its own beside those that all have."""
        return Counter(name, told, [*self.labels, *more], registry=self._own)

    @abstractmethod
    def _engine_families(self, stats: S | None) -> Iterator[Metric]:
        """What the engine says; `stats` None: it is not ready."""

    def note_response(self, method: str, handler: str, status: int) -> None:
        """Once an HTTP request. `handler` is the route, not the path: paths are without number."""
        self._responses.labels(
            **self.labels, method=method, handler=handler, status=str(status)
        ).inc()

    def counts(self) -> Counts:
        """At this moment, the same numbers that `render` shows."""
        counters: dict[str, float] = {}
        histograms: dict[str, ToldHistogram] = {}
        for family in self._own.collect():
            values = [it for it in family.samples if not it.name.endswith("_created")]
            if family.type == "histogram":
                histograms[family.name] = _told(values)
            elif values and values[0].labels.keys() == self.labels.keys():
                counters[values[0].name] = values[0].value
        return Counts(counters, histograms)

    def render(self, stats: S | None, ledger: ToldLedger | None = None) -> tuple[bytes, str]:
        """Everything, and its content type; `stats` None: the engine is not ready."""
        self._stats, self._ledger = stats, ledger
        return generate_latest(self._registry), CONTENT_TYPE

    def _families(self) -> Iterator[Metric]:
        yield from self._engine_families(self._stats)
        if self._ledger is not None:
            yield from ledger_families(self._ledger, self.labels)
        yield from self._own.collect()


def _told(samples: Sequence[Sample]) -> ToldHistogram:
    buckets = [it for it in samples if "le" in it.labels]
    (total,) = (it.value for it in samples if it.name.endswith("_sum"))
    bounds = [float(it.labels["le"]) for it in buckets[:-1]]
    return ToldHistogram(bounds, [it.value for it in buckets], total)


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
