"""The evidence of a running server: its setup, the ledger of its last seconds, and its metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from bireme.bench.client import fetch
from bireme.doctor.evidence import CacheFacts, Evidence, RankFacts
from bireme.engine.setup import Setup
from bireme.errors import RequestError
from bireme.observe.told import ToldLedger

_PREFIX = "bireme:"
_RUNNING, _WAITING, _USED = "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"
_PREEMPTED, _FAULTS, _MEMORY = (
    "num_preemptions_total",
    "rank_major_faults_total",
    "rank_memory_bytes",
)

Sample = tuple[str, Mapping[str, str], float]  # a metric's name without its prefix, labels, value


def ask_server(url: str, api_key: str | None, seconds: float) -> Evidence:
    """RequestError where it does not answer, or is no server of ours."""
    paths = ("/debug/setup", f"/debug/ledger?seconds={seconds:g}&columns=1", "/metrics")
    setup, ledger, metrics = asyncio.run(fetch(url, api_key, *paths))
    try:
        return evidence_of(
            url,
            msgspec.json.decode(setup, type=Setup),
            msgspec.json.decode(ledger, type=ToldLedger),
            list(_samples(metrics.decode())),
        )
    except (msgspec.DecodeError, ValueError) as error:
        raise RequestError(f"{url} is no server of this version: {error}") from None


def evidence_of(source: str, setup: Setup, ledger: ToldLedger, samples: list[Sample]) -> Evidence:
    values = {name: value for name, _, value in samples}
    faults = {labels["rank"]: value for name, labels, value in samples if name == _FAULTS}
    memory: dict[str, dict[str, int]] = {}
    for name, labels, value in samples:
        if name == _MEMORY:
            memory.setdefault(labels["rank"], {})[labels["kind"]] = int(value)
    ranks = [
        RankFacts(
            name=rank.name,
            stage=rank.stage,
            device=rank.device,
            num_threads=rank.num_threads,
            memory=memory.get(str(index), {}),
            major_faults=_whole(faults.get(str(index))),
        )
        for index, rank in enumerate(setup.ranks)
    ]
    return Evidence(
        source=source,
        ranks=ranks,
        ledger=ledger,
        num_cores=setup.num_cores,
        cache=_cache(values, setup),
        num_running=values.get(_RUNNING),
        environment=setup.environment,
    )


def _cache(values: Mapping[str, float], setup: Setup) -> CacheFacts | None:
    """None of a vision model, which keeps none."""
    if _USED not in values:
        return None
    return CacheFacts(
        most_used=values[_USED],
        num_preemptions=int(values.get(_PREEMPTED, 0)),
        most_waiting=int(values.get(_WAITING, 0)),
        num_requests=setup.num_requests,
    )


def _samples(text: str) -> Iterator[Sample]:
    for family in text_string_to_metric_families(text):
        sample: Any
        for sample in family.samples:
            yield sample.name.removeprefix(_PREFIX), sample.labels, sample.value


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
