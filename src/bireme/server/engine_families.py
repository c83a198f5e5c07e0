"""What the engine counts, as families of metrics: made anew from `Stats` whenever somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from bireme.engine.rank_stats import RankStats
from bireme.engine.service_messages import Stats
from bireme.observe.told import ToldLedger

Labels = dict[str, str]

_GAUGES: dict[str, tuple[str, Callable[[Stats], float]]] = {
    "num_requests_running": (
        "Requests that have a place in the batch.",
        lambda stats: stats.num_running,
    ),
    "num_requests_waiting": (
        "Requests that wait for a place, preempted ones among them.",
        lambda stats: stats.num_waiting,
    ),
    "kv_cache_usage_perc": (
        "Share of the KV cache's blocks in use, 0 to 1, of the kind that is fullest.",
        lambda stats: stats.cache_usage,
    ),
}

_COUNTERS: dict[str, tuple[str, Callable[[Stats], float]]] = {
    "num_preemptions": (
        "Requests that gave their blocks back for an older one.",
        lambda stats: stats.num_preemptions_total,
    ),
    "prefix_cache_queries": (
        "Prompt tokens that were looked up in the KV cache.",
        lambda stats: stats.prefix_queries_total,
    ),
    "prefix_cache_hits": (
        "Prompt tokens that were found in the KV cache.",
        lambda stats: stats.prefix_hits_total,
    ),
}

_RANK_COUNTERS: dict[str, tuple[str, Callable[[RankStats], float]]] = {
    "rank_steps": ("Steps that a rank has ended.", lambda rank: rank.num_steps_total),
    "rank_busy_seconds": (
        "Seconds in layers and in choosing tokens, without collectives and transfers.",
        lambda rank: rank.busy_s,
    ),
    "rank_idle_seconds": (
        "Seconds outside of steps, or waiting in one for another stage's message.",
        lambda rank: rank.idle_s,
    ),
    "rank_collective_seconds": (
        "Seconds in collectives of the tensor group, the wait for its other ranks among them.",
        lambda rank: rank.collective_s,
    ),
    "rank_overhead_seconds": (
        "Seconds of steps that are nothing else: their inputs and tables.",
        lambda rank: rank.overhead_s,
    ),
    "rank_major_faults": (
        "Pages of its memory that a rank had to read from disk.",
        lambda rank: rank.major_faults_total,
    ),
    "rank_collective_bytes": (
        "Bytes of the tensors that collectives summed or gathered.",
        lambda rank: rank.collective_bytes,
    ),
}

_TRANSFERS: dict[str, tuple[str, Callable[[RankStats], float], Callable[[RankStats], float]]] = {
    "rank_transfer_seconds": (
        "Seconds in messages between stages, with the wait for the other side; receiving is idle too.",
        lambda rank: rank.send_s,
        lambda rank: rank.receive_s,
    ),
    "rank_transferred_bytes": (
        "Bytes of messages between stages.",
        lambda rank: rank.sent_bytes,
        lambda rank: rank.received_bytes,
    ),
}

_MEMORY: dict[str, Callable[[RankStats], int]] = {
    "weights": lambda rank: rank.memory.weight_bytes,
    "cache": lambda rank: rank.memory.cache_bytes,
    "steps": lambda rank: rank.memory.step_bytes,
}


def ready_family(is_ready: bool, labels: Labels) -> Metric:
    ready = GaugeMetricFamily(
        "engine_ready", "1 while the engine takes requests, else 0.", labels=[*labels]
    )
    ready.add_metric([*labels.values()], float(is_ready))
    return ready


def engine_families(stats: Stats | None, labels: Labels) -> Iterator[Metric]:
    """None of an engine that is not ready, or not any more: of that one only this is told."""
    yield ready_family(stats is not None, labels)
    if stats is None:
        return
    for name, (told, gauge) in _GAUGES.items():
        family = GaugeMetricFamily(name, told, labels=[*labels])
        family.add_metric([*labels.values()], gauge(stats))
        yield family
    for name, (told, count) in _COUNTERS.items():
        counter = CounterMetricFamily(name, told, labels=[*labels])
        counter.add_metric([*labels.values()], count(stats))
        yield counter
    yield from rank_families(stats.ranks, labels)


def rank_families(ranks: Sequence[RankStats], labels: Labels) -> Iterator[Metric]:
    names = [*labels, "stage", "rank"]
    values = [([*labels.values(), str(rank.stage), str(rank.rank)], rank) for rank in ranks]
    for name, (told, count) in _RANK_COUNTERS.items():
        family = CounterMetricFamily(name, told, labels=names)
        for own, rank in values:
            family.add_metric(own, count(rank))
        yield family
    for name, (told, *directions) in _TRANSFERS.items():
        transfers = CounterMetricFamily(name, told, labels=[*names, "direction"])
        for own, rank in values:
            for direction, read in zip(("send", "receive"), directions, strict=True):
                transfers.add_metric([*own, direction], read(rank))
        yield transfers
    memory = GaugeMetricFamily(
        "rank_memory_bytes",
        "Bytes that a rank holds; those of steps are what the largest may take, as planned.",
        labels=[*names, "kind"],
    )
    for own, rank in values:
        for kind, size in _MEMORY.items():
            memory.add_metric([*own, kind], size(rank))
    yield memory


def ledger_families(ledger: ToldLedger, labels: Labels) -> Iterator[Metric]:
    """The bubble ledger of the last moment; `docs/metrics.md` says what its rows are."""
    family = GaugeMetricFamily(
        "ledger_share",
        "Share of a rank's time in the last second, by row of the bubble ledger; rows add up to 1.",
        labels=[*labels, "stage", "rank", "row"],
    )
    for number, rank in enumerate(ledger.ranks):
        for row, share in rank.shares.items():
            family.add_metric([*labels.values(), str(rank.stage), str(number), row], share)
    yield family
