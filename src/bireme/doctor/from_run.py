"""The evidence of a run on disk."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from bireme.checkpoint.manifest import is_artifact
from bireme.doctor.evidence import CacheFacts, Evidence, RankFacts
from bireme.doctor.files import damage, departures
from bireme.observe.profile_records import Profile, RankMemory
from bireme.observe.run_folder import RunFolder
from bireme.observe.run_records import RunRank


def evidence_of(run: RunFolder) -> Evidence:
    """With the artifact that it ran, where it is still there. UserError where the folder is damaged."""
    about, profile = run.about, run.profile
    threads, files = about.settings.num_threads, _artifact(about.model.folder)
    ranks = zip(about.layout.ranks, profile.memory, strict=True)
    return Evidence(
        source=str(run.path),
        ranks=[_facts(rank, memory, threads) for rank, memory in ranks],
        ledger=run.ledger.told,
        num_cores=about.hardware.num_cores,
        cache=_cache(profile, about.settings.num_cache_tokens / about.settings.max_model_len),
        num_running=mean([step.num_running for step in profile.steps] or [0]),
        environment=about.settings.environment,
        damage=() if files is None else damage(files),
        departures=() if files is None else departures(files),
    )


def _artifact(folder: str | None) -> Path | None:
    """None where another checkpoint was read, or none."""
    return Path(folder) if folder is not None and is_artifact(Path(folder)) else None


def _cache(profile: Profile, num_requests: float) -> CacheFacts:
    steps = profile.steps
    return CacheFacts(
        most_used=max((step.cache_usage for step in steps), default=0.0),
        num_preemptions=profile.throughput.num_preemptions,
        most_waiting=max((step.num_waiting for step in steps), default=0),
        num_requests=num_requests,
    )


def _facts(rank: RunRank, memory: RankMemory, num_threads: int) -> RankFacts:
    return RankFacts(
        name=rank.name,
        stage=rank.stage,
        device=rank.device,
        num_threads=num_threads,
        memory={"weights": memory.weight_bytes, "cache": memory.cache_bytes},
        major_faults=memory.num_major_faults,
    )
