"""The evidence of a running server, which is watched: its setup, its metrics, and the ledger of that time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from bireme.bench.client import Client, Target
from bireme.doctor.evidence import CacheFacts, Evidence, RankFacts
from bireme.engine.setup import Setup
from bireme.errors import RequestError
from bireme.observe.told import ToldLedger

_EVERY_S = 0.5
_PREFIX = "bireme:"
_RUNNING, _WAITING, _USED = "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"
_OF_EACH = (_RUNNING, _WAITING, _USED)
_PREEMPTED, _FAULTS, _MEMORY = (
    "num_preemptions_total",
    "rank_major_faults_total",
    "rank_memory_bytes",
)

Sample = tuple[str, Mapping[str, str], float]  # a metric's name without its prefix, labels, value


Samples = Sequence[Sample]


def ask_server(url: str, api_key: str | None, seconds: float) -> Evidence:
    """Watches it for so long. RequestError where it does not answer, or is no server of ours."""
    try:
        return asyncio.run(_watch(url, api_key, seconds))
    except (msgspec.DecodeError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{url} is no server of this version: {error}") from None


async def _watch(url: str, api_key: str | None, seconds: float) -> Evidence:
    async with Client(Target.of(url, api_key)) as client:
        setup = msgspec.json.decode(await client.fetch("/debug/setup"), type=Setup)
        end_s, moments = time.monotonic() + seconds, list[Samples]([await _samples(client)])
        while (left_s := end_s - time.monotonic()) > 0:
            await asyncio.sleep(min(_EVERY_S, left_s))
            keep(moments, await _samples(client))
        ledger = await client.fetch(f"/debug/ledger?seconds={seconds:g}&columns=1")
    return evidence_of(url, setup, msgspec.json.decode(ledger, type=ToldLedger), moments)


def keep(moments: list[Samples], latest: Samples) -> None:
    """As the last of them; of those between the first and the last only what is looked at of each."""
    if len(moments) > 1:
        moments[-1] = [sample for sample in moments[-1] if sample[0] in _OF_EACH]
    moments.append(latest)


def evidence_of(
    source: str, setup: Setup, ledger: ToldLedger, moments: Sequence[Samples]
) -> Evidence:
    """`moments` are the metrics' samples from first to last: counters are told by how much they grew."""
    ranks = [
        RankFacts(
            name=rank.name,
            stage=rank.stage,
            device=rank.device,
            num_threads=rank.num_threads,
            memory=_memory(moments[-1], str(index)),
            major_faults=_grown(moments, _FAULTS, rank=str(index)),
        )
        for index, rank in enumerate(setup.ranks)
    ]
    running = [_value(moment, _RUNNING) for moment in moments]
    known = [value for value in running if value is not None]
    return Evidence(
        source=source,
        ranks=ranks,
        ledger=ledger,
        num_cores=setup.num_cores,
        cache=_cache(moments, setup),
        num_running=mean(known) if known else None,
        environment=setup.environment,
    )


def _cache(moments: Sequence[Samples], setup: Setup) -> CacheFacts | None:
    """None of a vision model, which keeps none."""
    pairs = [(_value(moment, _USED), _value(moment, _WAITING)) for moment in moments]
    found = [
        (used, int(waiting)) for used, waiting in pairs if used is not None and waiting is not None
    ]
    if not found:
        return None
    return CacheFacts.of(found, _grown(moments, _PREEMPTED) or 0, setup.num_requests)


def _value(samples: Samples, wanted: str, **labels: str) -> float | None:
    """Of the first sample that has these labels; None where there is none."""
    for name, found, value in samples:
        if name == wanted and labels.items() <= found.items():
            return value
    return None


def _grown(moments: Sequence[Samples], wanted: str, **labels: str) -> int | None:
    first, last = (_value(moments[at], wanted, **labels) for at in (0, -1))
    return None if first is None or last is None else int(last - first)


def _memory(samples: Samples, rank: str) -> dict[str, int]:
    return {
        labels["kind"]: int(value)
        for name, labels, value in samples
        if name == _MEMORY and labels["rank"] == rank
    }


async def _samples(client: Client) -> list[Sample]:
    text = (await client.fetch("/metrics")).decode()
    families: Any = text_string_to_metric_families(text)
    return [
        (sample.name.removeprefix(_PREFIX), sample.labels, sample.value)
        for family in families
        for sample in family.samples
    ]
