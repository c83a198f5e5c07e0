"""Run folders of pipelines that were never there."""

from __future__ import annotations

from datetime import UTC, datetime

from piped import Piped

from bireme.chrome_trace import Recorded
from bireme.config import EngineConfig
from bireme.observe.ledger import make_ledger
from bireme.observe.profile_records import Latency, Profile, Throughput
from bireme.observe.run_records import (
    RequestWorkload,
    RunAbout,
    RunHardware,
    RunLayout,
    RunLedger,
    RunModel,
    RunRank,
    RunSettings,
)


def about_of(recorded: Recorded) -> RunAbout:
    ranks = [
        RunRank(
            rank=index, name=rank.name, stage=rank.stage, tp_rank=rank.tp_rank, device="cpu",
            layers=(rank.stage, rank.stage + 1),
        )
        for index, rank in enumerate(recorded.ranks)
    ]  # fmt: skip
    num_stages = 1 + max(rank.stage for rank in ranks)
    widths = tuple(sum(rank.stage == stage for rank in ranks) for stage in range(num_stages))
    return RunAbout(
        command=["bireme", "profile", "made-up"],
        date=datetime(2026, 1, 2, tzinfo=UTC),
        elapsed_s=1.5,
        versions={"bireme": "0"},
        hardware=RunHardware(
            host="here", cpu="a CPU", num_cores=4, memory_bytes=1 << 34, load_average=0.5,
            devices={"cpu": "a CPU"},
        ),
        model=RunModel(name="made-up", folder=None, dtype="float32", num_parameters=10),
        layout=RunLayout(widths=widths, layers_per_stage=(1,) * num_stages, ranks=ranks),
        workload=RequestWorkload(batch=2, input_len=3, output_len=4),
        settings=RunSettings(
            num_threads=1, transport="shared memory", environment={}, max_model_len=64,
            num_cache_tokens=128, engine=EngineConfig(),
        ),
    )  # fmt: skip


def profile_of(recorded: Recorded) -> Profile:
    """Nothing but the lists that must be there."""
    ledger = make_ledger(recorded)
    return Profile(
        seconds=(ledger.end_ns - ledger.start_ns) / 1e9, num_steps=1, is_whole=True,
        throughput=Throughput(
            elapsed_s=1.0, num_requests=2, num_input_tokens=6, num_output_tokens=8,
            requests_per_s=2.0, total_tokens_per_s=14.0, output_tokens_per_s=8.0, num_preemptions=0,
        ),
        latency=Latency(ttft_s={}, itl_s={}, e2e_s={}, queue_s={}, requests=[]),
        collectives=[], messages=[], layers=[], memory=[], rates=[], steps=[],
    )  # fmt: skip


def recorded_run() -> tuple[RunAbout, Recorded, RunLedger, Profile]:
    """Two stages, twenty steps: arguments of `write_run_folder`."""
    recorded = Piped(2, 20, 2).run().recorded
    ledger = RunLedger.of(make_ledger(recorded))
    return about_of(recorded), recorded, ledger, profile_of(recorded)
