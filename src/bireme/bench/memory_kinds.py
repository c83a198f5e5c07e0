"""Each rank's memory by kind, from what it says of itself and what it was loaded with."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from bireme.engine.llm import LLM
from bireme.engine.messages import RankUsage
from bireme.engine.rank_stats import RankBytes, RankStats
from bireme.observe.profile_records import RankMemory

_HOW_CPU = {
    "weights": "size of the parameters; resident pages by mincore",
    "cache": "size of the cache's tensors; resident pages by mincore",
    "activations": "VmHWM in a pass of steps, less Rss after it and malloc_trim",
    "communication": "Pss of the mappings bireme-world and bireme-steps; gloo's own buffers are in other",
    "other": "Pss after malloc_trim, less what is resident of the above",
}
_HOW_CUDA = {
    "weights": "size of the parameters",
    "cache": "size of the cache's tensors",
    "activations": "torch.cuda.max_memory_allocated in a pass of steps, less memory_allocated after it",
    "communication": "how much less was free on the device after its groups were made and connected",
    "other": "cudaMemGetInfo's used bytes of the device, other processes' among them, less the above",
}
_HOW_STAGE = {
    "weights": "size of the tensors that were loaded; what is resident is of them with BatchNorms folded",
    "activations": "the most that was held in the trial's runs, less what was held behind them",
}


def memory_of_ranks(
    llm: LLM, measured: tuple[Sequence[RankUsage], Sequence[RankUsage]], looked: Sequence[RankUsage]
) -> list[RankMemory]:
    """`measured`: before and behind the measured pass; `looked`: behind the one in which the peak was
    looked at."""
    ranks = zip(llm.executor.rank_stats(), *measured, looked, strict=True)
    return [rank_memory(*rank) for rank in ranks]


def rank_memory(
    stats: RankStats, before: RankUsage, after: RankUsage, usage: RankUsage
) -> RankMemory:
    """Of one rank."""
    return _memory(stats.rank, stats.memory, before, after, usage)


def stage_memory(
    rank: int, weight_bytes: int, planned_step_bytes: int, before: RankUsage, after: RankUsage
) -> RankMemory:
    """Of one stage of a vision model, `before` the runs of a trial and behind them."""
    held = RankBytes(weight_bytes, 0, planned_step_bytes)
    found = _memory(rank, held, before, after, after)
    how = {kind: _HOW_STAGE.get(kind, text) for kind, text in found.how.items() if kind != "cache"}
    return msgspec.structs.replace(found, cache_bytes=None, cache_resident_bytes=None, how=how)


def _memory(
    rank: int, held: RankBytes, before: RankUsage, after: RankUsage, usage: RankUsage
) -> RankMemory:
    is_cuda = usage.device_used_bytes is not None
    if usage.device_used_bytes is None:
        resident = usage.weight_resident_bytes + usage.cache_resident_bytes
        other = usage.pss_bytes - resident - usage.communication_bytes
    else:
        kinds = held.weight_bytes + held.cache_bytes + (usage.beyond_rest_bytes or 0)
        other = usage.device_used_bytes - kinds - usage.communication_bytes
    return RankMemory(
        rank=rank,
        weight_bytes=held.weight_bytes,
        cache_bytes=held.cache_bytes,
        activation_bytes=usage.beyond_rest_bytes,
        communication_bytes=usage.communication_bytes,
        other_bytes=max(0, other),
        planned_step_bytes=held.step_bytes,
        weight_resident_bytes=usage.weight_resident_bytes,
        cache_resident_bytes=usage.cache_resident_bytes,
        rss_bytes=usage.rss_bytes,
        pss_bytes=usage.pss_bytes,
        shared_bytes=usage.shared_bytes,
        swapped_bytes=usage.swapped_bytes,
        num_major_faults=after.num_major_faults - before.num_major_faults,
        reserved_bytes=usage.reserved_bytes,
        num_alloc_retries=_less(after.num_alloc_retries, before.num_alloc_retries),
        how=_HOW_CUDA if is_cuda else _HOW_CPU,
    )


def _less(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before
