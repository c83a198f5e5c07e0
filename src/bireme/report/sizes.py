"""Throughput by a size that was chosen: the run's own among the others that were measured."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from bireme.observe.profile_records import Latency, Profile, SizePass, Spread, Throughput
from bireme.observe.run_records import RunAbout


class SizeData(msgspec.Struct, frozen=True, kw_only=True):
    """`is_own`: of the run itself."""

    size: int
    is_own: bool
    tokens_per_s: float
    ttft_s: Spread
    itl_s: Spread
    e2e_s: Spread


def batches(about: RunAbout, profile: Profile) -> list[SizeData]:
    """By requests at once; tokens of answers."""
    others = [_row(it.size, it.output_tokens_per_s, it) for it in profile.batches]
    if not isinstance(profile.throughput, Throughput):
        return others
    rate = profile.throughput.output_tokens_per_s
    return _with_own(about.workload.batch, rate, profile.latency, others)


def chunks(about: RunAbout, profile: Profile) -> list[SizeData]:
    """By tokens that a step may hold; tokens of prompts and answers."""
    others = [_row(it.size, it.total_tokens_per_s, it) for it in profile.chunks]
    engine, found = about.settings.engine, profile.throughput
    if engine is None or not isinstance(found, Throughput):
        return others
    own = engine.max_num_batched_tokens
    return _with_own(own, found.total_tokens_per_s, profile.latency, others)


def _with_own(
    size: int, rate: float, latency: Latency | None, others: Iterable[SizeData]
) -> list[SizeData]:
    """From small to large; nothing where no other was measured."""
    rest = [it for it in others if it.size != size]
    if not rest or latency is None:
        return rest
    return sorted([*rest, _row(size, rate, latency, is_own=True)], key=lambda it: it.size)


def _row(size: int, rate: float, times: SizePass | Latency, *, is_own: bool = False) -> SizeData:
    return SizeData(
        size=size,
        is_own=is_own,
        tokens_per_s=rate,
        ttft_s=times.ttft_s,
        itl_s=times.itl_s,
        e2e_s=times.e2e_s,
    )
