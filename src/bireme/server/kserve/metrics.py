"""What a server of images counts, and what its engine does."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from bireme.server.engine_families import rank_families, ready_family
from bireme.server.metrics_base import REQUEST_S, Metrics
from bireme.vision.client import ImageStats
from bireme.vision.engine import ImageRequest

_NUM_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_HISTOGRAMS = {
    "e2e_request_latency_seconds": ("Seconds from arrival to the last logits.", REQUEST_S),
    "request_queue_time_seconds": ("Seconds from arrival to the first micro-batch.", REQUEST_S),
    "request_images": ("Images of a request that was answered.", _NUM_IMAGES),
}
_GAUGES: dict[str, tuple[str, Callable[[ImageStats], float]]] = {
    "num_images_running": ("Images in micro-batches in flight.", lambda it: it.num_running),
    "num_images_waiting": ("Images that wait for a micro-batch.", lambda it: it.num_waiting),
}
_COUNTERS: dict[str, tuple[str, Callable[[ImageStats], float]]] = {
    "images": ("Images that went through.", lambda it: it.num_images_total),
    "micro_batches": ("Micro-batches that went through.", lambda it: it.num_micro_batches_total),
}


class ImageMetrics(Metrics[ImageStats]):
    def __init__(self, model_name: str) -> None:
        super().__init__(model_name, _HISTOGRAMS)

    def note_done(self, request: ImageRequest, now_s: float) -> None:
        """Once a request; `now_s` of the monotonic clock."""
        scheduled_s = request.scheduled_s or now_s
        self._observe["e2e_request_latency_seconds"].observe(now_s - request.arrival_s)
        self._observe["request_queue_time_seconds"].observe(scheduled_s - request.arrival_s)
        self._observe["request_images"].observe(len(request.images))

    def _engine_families(self, stats: ImageStats | None) -> Iterator[Metric]:
        yield ready_family(stats is not None, self.labels)
        if stats is None:
            return
        names, values = [*self.labels], [*self.labels.values()]
        for name, (told, gauge) in _GAUGES.items():
            family = GaugeMetricFamily(name, told, labels=names)
            family.add_metric(values, gauge(stats))
            yield family
        for name, (told, count) in _COUNTERS.items():
            counter = CounterMetricFamily(name, told, labels=names)
            counter.add_metric(values, count(stats))
            yield counter
        yield from rank_families(stats.ranks, self.labels)
