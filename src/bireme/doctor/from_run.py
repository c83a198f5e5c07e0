"""The evidence of a run on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean

from bireme.checkpoint.manifest import is_artifact
from bireme.doctor.evidence import CacheFacts, Evidence, RankFacts
from bireme.doctor.files import damage, departures
from bireme.errors import UserError
from bireme.observe.profile_records import Profile, RankMemory, Throughput
from bireme.observe.run_folder import RunFolder
from bireme.observe.run_records import ImageWorkload, RequestWorkload, RunRank, RunSettings


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
        cache=_cache(profile, about.settings),
        num_running=_num_running(about.workload, profile),
        environment=about.settings.environment,
        cut_option="--split" if isinstance(about.workload, ImageWorkload) else "--layers-per-stage",
        damage=() if files is None or progress is None else damage(files, progress),
        departures=() if files is None else departures(files),
    )


def artifact_of(run: RunFolder) -> Path | None:
    """None where another checkpoint was read, or none, or it is gone."""
    folder = run.about.model.folder
    return Path(folder) if folder is not None and is_artifact(Path(folder)) else None


def _num_running(workload: RequestWorkload | ImageWorkload, profile: Profile) -> float:
    """Micro-batches of images are there all at once."""
    if isinstance(workload, ImageWorkload):
        return workload.num_micro_batches * workload.num_batches
    return mean([step.num_running for step in profile.steps] or [0])


def _cache(profile: Profile, settings: RunSettings) -> CacheFacts | None:
    """None of a vision model."""
    num_tokens, longest = settings.num_cache_tokens, settings.max_model_len
    if not isinstance(profile.throughput, Throughput) or num_tokens is None or longest is None:
        return None
    moments = [(step.cache_usage, step.num_waiting) for step in profile.steps]
    return CacheFacts.of(moments, profile.throughput.num_preemptions, num_tokens / longest)


def _facts(rank: RunRank, memory: RankMemory, num_threads: int) -> RankFacts:
    cache = memory.cache_bytes  # without one, weights bound nothing that others hold
    return RankFacts(
        name=rank.name,
        stage=rank.stage,
        device=rank.device,
        num_threads=num_threads,
        memory={} if cache is None else {"weights": memory.weight_bytes, "cache": cache},
        major_faults=memory.num_major_faults,
    )
