"""The evidence of a run on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean

from bireme.checkpoint.manifest import is_artifact
from bireme.doctor.evidence import CacheFacts, Evidence, RankFacts
from bireme.doctor.files import damage, departures
from bireme.errors import UserError
from bireme.observe.profile_records import Profile, RankMemory
from bireme.observe.run_folder import RunFolder
from bireme.observe.run_records import RunRank


def evidence_of(run: RunFolder, *, progress: Callable[[int], None] | None = None) -> Evidence:
    """UserError where the folder is damaged. With `progress`, which gets bytes, the artifact that it ran is read
    too, where it is still there."""
    about, profile = run.about, run.profile
    ranks, threads = about.layout.ranks, about.settings.num_threads
    if len(profile.memory) != len(ranks):
        raise UserError(
            f"{run.path} is damaged: it has {len(ranks)} ranks and the memory of {len(profile.memory)}; "
            "profile again"
        )
    files = None if progress is None else artifact_of(run)
    return Evidence(
        source=str(run.path),
        ranks=[_facts(*pair, threads) for pair in zip(ranks, profile.memory, strict=True)],
        ledger=run.ledger.told,
        num_cores=about.hardware.num_cores,
        cache=_cache(profile, about.settings.num_cache_tokens / about.settings.max_model_len),
        num_running=mean([step.num_running for step in profile.steps] or [0]),
        environment=about.settings.environment,
        damage=() if files is None or progress is None else damage(files, progress),
        departures=() if files is None else departures(files),
    )


def artifact_of(run: RunFolder) -> Path | None:
    """None where another checkpoint was read, or none, or it is gone."""
    folder = run.about.model.folder
    return Path(folder) if folder is not None and is_artifact(Path(folder)) else None


def _cache(profile: Profile, num_requests: float) -> CacheFacts:
    moments = [(step.cache_usage, step.num_waiting) for step in profile.steps]
    return CacheFacts.of(moments, profile.throughput.num_preemptions, num_requests)


def _facts(rank: RunRank, memory: RankMemory, num_threads: int) -> RankFacts:
    return RankFacts(
        name=rank.name,
        stage=rank.stage,
        device=rank.device,
        num_threads=num_threads,
        memory={"weights": memory.weight_bytes, "cache": memory.cache_bytes},
        major_faults=memory.num_major_faults,
    )
