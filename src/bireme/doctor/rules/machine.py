"""Is it the machine?"""

from __future__ import annotations

from collections.abc import Iterator

from bireme.doctor.evidence import Evidence
from bireme.doctor.finding import Finding

_SHORT = 0.05  # of the time


def too_many_threads(found: Evidence) -> Iterator[Finding]:
    threads = [rank.num_threads for rank in found.ranks if rank.is_cpu and rank.num_threads]
    if found.num_cores is not None and sum(threads) > found.num_cores:
        yield Finding(
            rule="too-many-threads",
            title="more threads than cores",
            figure=f"{len(threads)} ranks have {sum(threads)} threads in all, their host {found.num_cores} cores",
            remedy=f"use at most {found.num_cores} ranks there",
            share=1.0,
        )


def nccl_settings(found: Evidence) -> Iterator[Finding]:
    """What takes NCCL's fast ways away."""
    for name in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE"):
        value = found.environment.get(name, "0")
        if value not in ("", "0") and not all(rank.is_cpu for rank in found.ranks):
            yield Finding(
                rule="nccl-settings",
                title=f"{name} takes a fast way away",
                figure=f"{name}={value}",
                remedy="unset it, unless the hardware needs it",
                share=0.2,
            )


def throttled_clocks(found: Evidence) -> Iterator[Finding]:
    """A GPU that its hardware, or its heat, slowed down while steps ran."""
    for rank in found.ranks:
        reason = max(rank.slowdowns, key=lambda it: rank.slowdowns[it], default="")
        share = rank.slowdowns.get(reason, 0.0)
        if share > _SHORT:
            yield Finding(
                rule="throttled-clocks",
                title=f"the clocks of {rank.name} are slowed down",
                figure=f"{reason.replace('_', ' ')}, {share:.0%} of the time in which steps ran",
                remedy="see the GPU's cooling and power supply (nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER)",
                share=share,
            )


def no_peer_access(found: Evidence) -> Iterator[Finding]:
    if found.apart:
        one, other = found.apart[0]
        more = f" (and {len(found.apart) - 1} more pairs)" if len(found.apart) > 1 else ""
        yield Finding(
            rule="no-peer-access",
            title="GPUs cannot reach each other's memory",
            figure=f"{one} and {other}{more}: what they pass each other goes through the host's memory",
            remedy="put ranks of one tensor group, and neighbouring stages, on GPUs that can (nvidia-smi topo -m, "
            "--devices); in a virtual machine or container, see whether it allows peer access",
            share=0.2,
        )
