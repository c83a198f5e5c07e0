"""In the order in which an expert looks: the files, where time goes, collectives, memory, the batch, the
machine. Each says what it found and what to do; `docs/doctor.md` has a section on each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bireme.doctor.evidence import Evidence
from bireme.doctor.finding import Finding
from bireme.doctor.rules.artifact import damaged_files, wrong_model
from bireme.doctor.rules.batch import large_batch, small_batch, small_chunks
from bireme.doctor.rules.exchanges import exposed_collectives, slow_hand_over, slow_link
from bireme.doctor.rules.machine import (
    nccl_settings,
    no_peer_access,
    throttled_clocks,
    too_many_threads,
)
from bireme.doctor.rules.memory import allocator, paging, small_cache, uneven_memory
from bireme.doctor.rules.rank_time import (
    few_requests,
    late_rank,
    launch_bound,
    slow_host,
    slow_stage,
)

Rule = Callable[[Evidence], Iterator[Finding]]

RULES: dict[str, Rule] = {
    rule.__name__.replace("_", "-"): rule
    for rule in (
        damaged_files, wrong_model, slow_stage, few_requests, slow_host, launch_bound, late_rank, slow_link,
        exposed_collectives, slow_hand_over, uneven_memory, paging, small_cache, allocator, small_batch,
        large_batch, small_chunks, too_many_threads, throttled_clocks, no_peer_access, nccl_settings,
    )
}  # fmt: skip


def examine(found: Evidence) -> list[Finding]:
    """The one that costs most first; of equals, in the order of `RULES`."""
    findings = [finding for rule in RULES.values() for finding in rule(found)]
    return sorted(findings, key=lambda finding: -finding.share)
