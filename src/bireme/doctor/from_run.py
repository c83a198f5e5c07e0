"""The evidence of a run on disk."""

from __future__ import annotations

from pathlib import Path

from bireme.checkpoint.manifest import is_artifact
from bireme.doctor.evidence import CacheFacts, Evidence, RankFacts
from bireme.doctor.files import damage, departures
from bireme.engine.rank_stats import RankStats
from bireme.engine.setup import RankSetup
from bireme.observe.run_folder import Run, read_run


def read_evidence(folder: Path) -> Evidence:
    """With the artifact that it ran, where it is still there."""
    return evidence_of(str(folder), read_run(folder))


def evidence_of(source: str, run: Run) -> Evidence:
    setup = run.setup
    files = None if setup.folder is None else Path(setup.folder)
    is_there = files is not None and is_artifact(files)
    return Evidence(
        source=source,
        ranks=[_facts(*pair) for pair in zip(setup.ranks, run.stats.ranks, strict=True)],
        ledger=run.ledger,
        num_cores=setup.num_cores,
        cache=CacheFacts(
            most_used=run.cache.most_used,
            num_preemptions=run.cache.num_preemptions,
            most_waiting=run.cache.most_waiting,
            num_requests=setup.num_requests,
        ),
        num_running=run.num_running,
        environment=setup.environment,
        damage=damage(files) if files is not None and is_there else (),
        departures=departures(files) if files is not None and is_there else (),
    )


def _facts(rank: RankSetup, stats: RankStats) -> RankFacts:
    memory = stats.memory
    return RankFacts(
        name=rank.name,
        stage=rank.stage,
        device=rank.device,
        num_threads=rank.num_threads,
        memory={
            "weights": memory.weight_bytes,
            "cache": memory.cache_bytes,
            "steps": memory.step_bytes,
        },
        major_faults=stats.major_faults_total,
    )
