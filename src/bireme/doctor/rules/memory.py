"""Is it memory?"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean

from bireme.config import format_bytes
from bireme.doctor.evidence import Evidence
from bireme.doctor.finding import Finding

_UNEVEN = 1.5  # bytes of the fullest rank, over the mean
_MANY_FAULTS = 100  # pages read from disk while steps ran
_SHORT = 0.05  # of the time
_UNUSED = 0.25  # of what an allocator holds


def uneven_memory(found: Evidence) -> Iterator[Finding]:
    if len(set(found.widths)) > 1:
        return  # a narrow stage holds more of each layer
    weights = [rank.memory.get("weights", 0) for rank in found.ranks]
    most, even = max(weights, default=0), mean(weights or [0])
    if most > _UNEVEN * even:
        fullest = found.ranks[weights.index(most)].name
        yield Finding(
            rule="uneven-memory",
            title=f"{fullest} holds more weights than others",
            figure=f"{format_bytes(most)}, where the mean is {format_bytes(int(even))}",
            remedy=f"choose {found.cut_option} so that the fullest rank holds less: it bounds the cache of all",
            share=0.0,
        )


def paging(found: Evidence) -> Iterator[Finding]:
    for rank in found.ranks:
        if rank.major_faults is not None and rank.major_faults > _MANY_FAULTS:
            yield Finding(
                rule="paging",
                title=f"{rank.name} reads its memory from disk",
                figure=f"{rank.major_faults} pages while steps ran",
                remedy="its host has too little memory: use more ranks, a smaller --memory-limit, or end what "
                "else runs there",
                share=1.0,
            )


def small_cache(found: Evidence) -> Iterator[Finding]:
    cache = found.cache
    if cache is None:
        return
    if cache.num_preemptions or cache.short_share > _SHORT:
        holds = (
            ""
            if cache.num_requests is None
            else f"; it holds {cache.num_requests:.1f} requests of the longest length"
        )
        yield Finding(
            rule="small-cache",
            title="the KV cache is too small",
            figure=f"{cache.num_preemptions} preemptions, {cache.most_used:.0%} in use, "
            f"{cache.most_waiting} waiting{holds}",
            remedy="give ranks more memory (--memory-limit), use more of them, or a lower --max-model-len",
            share=max(cache.short_share, 0.3),
        )


def allocator(found: Evidence) -> Iterator[Finding]:
    """A GPU's allocator that holds what nobody uses, or had to let go of it before it could go on."""
    for rank in found.ranks:
        held = rank.memory.get("weights", 0) + rank.memory.get("cache", 0)
        held += rank.memory.get("activations", 0)
        unused = max(0, (rank.reserved_bytes or 0) - held)
        is_wasted = unused > _UNUSED * (rank.reserved_bytes or 0) and unused > rank.memory.get(
            "cache", 0
        )
        if rank.alloc_retries or is_wasted:
            yield Finding(
                rule="allocator",
                title=f"the allocator of {rank.name} is short of memory that it holds",
                figure=f"it holds {format_bytes(rank.reserved_bytes or 0)}, of which {format_bytes(unused)} were used "
                f"by no weights, cache or step; it was emptied {rank.alloc_retries or 0} times while steps ran",
                remedy="give PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, a lower --memory-limit or "
                "--max-num-batched-tokens, or end what else uses that GPU",
                share=0.3 if rank.alloc_retries else 0.0,
            )
