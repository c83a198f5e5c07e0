"""What a server's metrics show: with an engine of two stages, after a few requests."""

from __future__ import annotations

from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from bireme.engine.rank_stats import RankBytes, RankStats
from bireme.engine.service_messages import Stats
from bireme.observe.causes import Row
from bireme.observe.told import ToldLedger, ToldRank
from bireme.outputs import Delta
from bireme.server.finished import FinishedRequest
from bireme.server.kserve.metrics import ImageMetrics
from bireme.server.metrics import ServerMetrics
from bireme.server.metrics_base import Metrics
from bireme.vision.client import ImageStats
from bireme.vision.engine import ImageRequest

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def rank(stage: int, index: int) -> RankStats:
    return RankStats(
        stage=stage, rank=index, num_steps_total=9, busy_s=1.5, collective_s=0.5, send_s=0.25,
        receive_s=0.125, overhead_s=0.0625, idle_s=4.0, collective_bytes=100, sent_bytes=200,
        received_bytes=300, major_faults_total=400, memory=RankBytes(1000, 2000, 3000),
    )  # fmt: skip


STATS = Stats(
    num_running=3, num_waiting=2, cache_usage=0.5, num_preemptions_total=1,
    prefix_queries_total=64, prefix_hits_total=16, ranks=[rank(0, 0), rank(1, 1)],
)  # fmt: skip


def finished(reason: str = "stop", **more: float | str | None) -> FinishedRequest:
    values = {"queue_s": 0.5, "ttft_s": 1.0, "e2e_s": 3.0, **more}
    return FinishedRequest(
        finished_reason=reason, num_prompt_tokens=7, num_generation_tokens=4, num_cached_tokens=0,
        **values,  # type: ignore[arg-type]
    )  # fmt: skip


def delta(time_s: float, num_tokens: int = 1, choice: int = 0) -> Delta:
    return Delta(0, "", [5] * num_tokens, None, choice, time_s=time_s)


def used(*aliases: str) -> ServerMetrics:
    """A request of two choices, and one that its client left."""
    metrics = ServerMetrics("demo", aliases=aliases)
    watch = metrics.begin(7, arrival_s=100.0)
    for one in (delta(101.0), delta(101.5, choice=1), delta(101.75, 2), delta(102.0, 0)):
        watch.note_tokens(one)
    metrics.note_finished(finished())
    metrics.note_finished(finished("abort", ttft_s=None))
    metrics.note_response("POST", "/v1/completions", 200)
    return metrics


LEDGER = ToldLedger(
    seconds=1.0, until_s=0.0,
    ranks=[ToldRank(f"rank {it}", it, {row.value: 0.1 for row in Row}, {}, 0.0, False, "") for it in (0, 1)],
)  # fmt: skip


IMAGE_STATS = ImageStats(
    num_waiting=1, num_running=8, num_images_total=40, num_micro_batches_total=6, ranks=STATS.ranks
)


def used_for_images() -> ImageMetrics:
    """A request of two images."""
    metrics = ImageMetrics("resnet")
    request = ImageRequest(np.zeros((2, 3, 1, 1), np.float32))
    request.arrival_s, request.scheduled_s = 100.0, 100.25
    metrics.note_done(request, 101.0)
    metrics.note_response("POST", "/v2/models/{model}/infer", 200)
    return metrics


def shown(metrics: ServerMetrics, stats: Stats | None = STATS) -> Samples:
    """By name and labels, less those that all have."""
    return samples_of(metrics, stats)


def shown_of_images() -> Samples:
    return samples_of(used_for_images(), IMAGE_STATS)


def samples_of(metrics: Metrics[Any], stats: Any) -> Samples:
    body, _ = metrics.render(stats, None if stats is None else LEDGER)
    found: Samples = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            labels = frozenset(set(sample.labels.items()) - set(metrics.labels.items()))
            assert (sample.name, labels) not in found, f"{sample.name} is shown twice"
            found[sample.name, labels] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def names(samples: Samples) -> set[str]:
    return {name for name, _ in samples}
