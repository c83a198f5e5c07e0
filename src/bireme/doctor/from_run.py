"""The evidence of a run on disk."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from statistics import mean

from bireme.checkpoint.manifest import is_artifact
from bireme.doctor.evidence import CacheFacts, Evidence, Measured, Pace, RankFacts
from bireme.doctor.files import Certified, certified, damage
from bireme.errors import UserError
from bireme.observe.kernel_trace import kernel_share
from bireme.observe.profile_records import (
    Latency,
    Profile,
    RankMemory,
    RankRate,
    SizePass,
    Throughput,
)
from bireme.observe.run_folder import RunFolder
from bireme.observe.run_records import (
    ImageWorkload,
    RequestWorkload,
    RunAbout,
    RunRank,
    RunSettings,
)


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
    files, cut = None if progress is None else artifact_of(run), about.layout
    proof = Certified([], [])
    if files is not None:
        proof = certified(files, (cut.widths, cut.layers_per_stage))
    return Evidence(
        source=str(run.path),
        ranks=[_facts(run, *pair, threads) for pair in zip(ranks, profile.memory, strict=True)],
        ledger=run.ledger.told,
        num_cores=about.hardware.num_cores,
        cache=_cache(profile, about.settings),
        num_running=_num_running(about.workload, profile),
        is_slower_with_more=_is_slower_with_more(about.workload, profile),
        environment=about.settings.environment,
        cut_option="--split" if isinstance(about.workload, ImageWorkload) else "--layers-per-stage",
        pace=_pace(profile),
        collectives=profile.collectives,
        messages=profile.messages,
        batch=about.workload.batch,
        batches=_batches(about, profile),
        chunk=about.settings.engine.max_num_batched_tokens if about.settings.engine else None,
        largest_step=max((step.num_tokens for step in profile.steps), default=None),
        chunks=_chunks(about, profile),
        apart=_apart(about),
        damage=() if files is None or progress is None else damage(files, progress),
        departures=proof.departures,
        notes=[*_notes(profile), *proof.notes],
    )


def _notes(profile: Profile) -> list[str]:
    if profile.is_whole:
        return []
    elapsed_s = profile.throughput.elapsed_s
    return [
        f"the run is not whole: rings of spans held the last {profile.seconds:.1f} s of {elapsed_s:.1f} s, and "
        "shares of the time are of these; run it with fewer tokens"
    ]


def artifact_of(run: RunFolder) -> Path | None:
    """None where another checkpoint was read, or none, or it is gone."""
    folder = run.about.model.folder
    return Path(folder) if folder is not None and is_artifact(Path(folder)) else None


def _num_running(workload: RequestWorkload | ImageWorkload, profile: Profile) -> float:
    """Micro-batches of images are there all at once."""
    if isinstance(workload, ImageWorkload):
        return workload.num_micro_batches * workload.num_batches
    return mean([step.num_running for step in profile.steps] or [0])


def _is_slower_with_more(workload: RequestWorkload | ImageWorkload, profile: Profile) -> bool:
    """The run is of the fastest trial."""
    return isinstance(workload, ImageWorkload) and any(
        trial.num_micro_batches > workload.num_micro_batches and trial.stages.elapsed_s is not None
        for trial in profile.trials
    )


def _cache(profile: Profile, settings: RunSettings) -> CacheFacts | None:
    """None of a vision model."""
    num_tokens, longest = settings.num_cache_tokens, settings.max_model_len
    if not isinstance(profile.throughput, Throughput) or num_tokens is None or longest is None:
        return None
    moments = [(step.cache_usage, step.num_waiting) for step in profile.steps]
    return CacheFacts.of(moments, profile.throughput.num_preemptions, num_tokens / longest)


def _facts(run: RunFolder, rank: RunRank, memory: RankMemory, num_threads: int) -> RankFacts:
    profile = run.profile
    rate = next((it for it in profile.rates if (it.rank, it.phase) == (rank.rank, "decode")), None)
    clocks = next((it for it in profile.clocks if it.rank == rank.rank), None)
    trace = run.kernel_trace(rank.rank) if rank.device.startswith("cuda") else None
    cache = memory.cache_bytes  # without one, weights bound nothing that others hold
    return RankFacts(
        name=rank.name,
        stage=rank.stage,
        device=rank.device,
        num_threads=num_threads,
        memory={
            "activations": memory.activation_bytes or 0,
            **({} if cache is None else {"weights": memory.weight_bytes, "cache": cache}),
        },
        major_faults=memory.num_major_faults,
        decode_used=None if rate is None else _used(rate),
        kernel_share=None if trace is None else kernel_share(trace),
        reserved_bytes=memory.reserved_bytes,
        alloc_retries=memory.num_alloc_retries,
        slowdowns={} if clocks is None else clocks.slowdowns,
    )


def _used(rate: RankRate) -> tuple[float, float] | None:
    """Shares of the ceilings."""
    flop, most_flop = rate.flop_per_s, rate.ceiling_flop_per_s
    moved, most_moved = rate.bytes_per_s, rate.ceiling_bytes_per_s
    if flop is None or moved is None or most_flop is None or most_moved is None:
        return None
    return flop / most_flop, moved / most_moved


def _of_tokens(profile: Profile) -> tuple[Throughput, Latency] | None:
    """None of a vision model."""
    speed, latency = profile.throughput, profile.latency
    return (speed, latency) if isinstance(speed, Throughput) and latency is not None else None


def _pace(profile: Profile) -> Pace | None:
    if (found := _of_tokens(profile)) is None:
        return None
    speed, latency = found
    return Pace(
        output_tokens_per_s=speed.output_tokens_per_s,
        itl_s=latency.itl_s.get("mean", 0.0),
        num_steps=profile.num_steps,
        num_output_tokens=speed.num_output_tokens,
    )


def _batches(about: RunAbout, profile: Profile) -> list[Measured]:
    if (found := _of_tokens(profile)) is None:
        return []
    speed, latency = found
    others = {it.size: _measured(it.size, it.output_tokens_per_s, it) for it in profile.batches}
    own = _measured(about.workload.batch, speed.output_tokens_per_s, latency)
    return _with_own(own, others)


def _chunks(about: RunAbout, profile: Profile) -> list[Measured]:
    engine = about.settings.engine
    if engine is None or (found := _of_tokens(profile)) is None:
        return []
    speed, latency = found
    others = {it.size: _measured(it.size, it.total_tokens_per_s, it) for it in profile.chunks}
    own = _measured(engine.max_num_batched_tokens, speed.total_tokens_per_s, latency)
    return _with_own(own, others)


def _measured(size: int, rate: float, times: SizePass | Latency) -> Measured:
    return Measured(size, rate, times.itl_s.get("p50", 0.0), times.e2e_s.get("p50", 0.0))


def _with_own(own: Measured, others: dict[int, Measured]) -> list[Measured]:
    """From small to large, the run's own size among them; nothing where no other was measured."""
    found = {own.size: own} | others if others else {}
    return [found[size] for size in sorted(found)]


def _apart(about: RunAbout) -> list[tuple[str, str]]:
    """Ranks of one stage, or of neighbouring ones, on GPUs that cannot reach each other's memory."""
    pairs = {frozenset(pair) for pair in about.hardware.without_peer_access}
    return [
        (one.name, other.name)
        for one, other in combinations(about.layout.ranks, 2)
        if abs(one.stage - other.stage) <= 1 and frozenset((one.device, other.device)) in pairs
    ]
