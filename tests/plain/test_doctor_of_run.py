"""What rules look at, from a run folder of GPUs that were never there."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from runs import recorded_run

from bireme.cli import run as command
from bireme.doctor.evidence import Evidence
from bireme.doctor.from_run import evidence_of
from bireme.doctor.rules import examine
from bireme.observe.profile_records import RankClocks, RankMemory, RankRate, SizePass, StepSample
from bireme.observe.run_folder import RunFolder, prepare_run_folder, write_run_folder


def rate(rank: int, flop: float, num_bytes: float) -> RankRate:
    return RankRate(
        rank=rank, phase="decode", num_steps=1, num_tokens=1, compute_s=1.0, flop=1, num_bytes=1,
        flop_per_s=flop, bytes_per_s=num_bytes, ceiling_flop_per_s=100.0, ceiling_bytes_per_s=10.0,
    )  # fmt: skip


def memory(rank: int) -> RankMemory:
    sizes = {
        it.name: 1
        for it in msgspec.structs.fields(RankMemory)
        if it.type in (int, int | None) and it.name not in ("rank", "num_alloc_retries")
    }
    return RankMemory(rank=rank, how={}, num_alloc_retries=rank, **sizes)  # type: ignore[arg-type]


def size_pass(size: int, rate: float) -> SizePass:
    return SizePass(
        size=size, output_tokens_per_s=rate, total_tokens_per_s=2 * rate, num_preemptions=0, ttft_s={},
        itl_s={"p50": 0.1}, e2e_s={},
    )  # fmt: skip


def step(num_tokens: int) -> StepSample:
    return StepSample(
        step_id=1, time_s=0.0, phase="prefill", num_seqs=1, num_tokens=num_tokens, num_sampled=1, context_tokens=1,
        num_running=1, num_waiting=0, cache_usage=0.0, num_preemptions=0,
    )  # fmt: skip


def of_gpus(folder: Path) -> Evidence:
    about, recorded, ledger, profile = recorded_run()
    ranks = [msgspec.structs.replace(it, device=f"cuda:{it.rank}") for it in about.layout.ranks]
    about = msgspec.structs.replace(
        about,
        layout=msgspec.structs.replace(about.layout, ranks=ranks),
        hardware=msgspec.structs.replace(
            about.hardware, without_peer_access=[("cuda:0", "cuda:1")]
        ),
    )
    profile = msgspec.structs.replace(
        profile,
        memory=[memory(rank) for rank in range(2)],
        rates=[rate(0, 1.0, 2.0), rate(1, 1.0, 1.0)],
        batches=[size_pass(1, 4.0), size_pass(8, 40.0)],
        chunks=[size_pass(1024, 5.0)],
        steps=[step(24), step(2048)],
        clocks=[RankClocks(rank=1, num_samples=4, least_mhz=1, most_mhz=2, slowdowns={"hw_slowdown": 1.0})],
    )  # fmt: skip
    prepare_run_folder(folder)
    run = write_run_folder(folder, about, recorded, ledger, profile)
    (folder / "kernels").mkdir()
    events = [{"cat": "kernel", "name": "a", "ts": ts, "dur": 1} for ts in (0, 9)]
    (folder / "kernels" / "rank-0.json").write_text(json.dumps({"traceEvents": events}))
    return evidence_of(run)


def test_what_was_measured_of_gpus_is_there(tmp_path: Path) -> None:
    found = of_gpus(tmp_path / "run")
    assert [rank.decode_used for rank in found.ranks] == [(0.01, 0.2), (0.01, 0.1)]
    assert [rank.kernel_share for rank in found.ranks] == [pytest.approx(0.2), None]
    assert [rank.alloc_retries for rank in found.ranks] == [0, 1]
    assert [rank.slowdowns for rank in found.ranks] == [{}, {"hw_slowdown": 1.0}]
    assert len(found.apart) == 1


def test_the_runs_own_size_is_among_those_that_were_measured(tmp_path: Path) -> None:
    found = of_gpus(tmp_path / "run")
    assert [(it.size, it.tokens_per_s) for it in found.batches] == [(1, 4.0), (2, 8.0), (8, 40.0)]
    assert (found.batch, found.chunk) == (2, 2048)
    assert [(it.size, it.tokens_per_s) for it in found.chunks] == [(1024, 10.0), (2048, 14.0)]
    assert found.largest_step == 2048


def not_whole(folder: Path) -> RunFolder:
    """Of 8 tokens in 1 s and 20 steps the trace holds the last part."""
    about, recorded, ledger, profile = recorded_run()
    profile = msgspec.structs.replace(
        profile, memory=[memory(0), memory(1)], num_steps=20, is_whole=False, seconds=0.125
    )
    prepare_run_folder(folder)
    return write_run_folder(folder, about, recorded, ledger, profile)


def test_of_a_run_that_is_not_whole_all_steps_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evidence_of(not_whole(tmp_path / "run"))
    assert found.pace is not None
    assert found.pace.step_s == pytest.approx(1 / 20)
    (note,) = found.notes
    assert note.startswith("the run is not whole: rings of spans held the last 0.1 s of 1.0 s")
    status = command(["doctor", str(tmp_path / "run")])
    assert capsys.readouterr().out.endswith(f"note: {note}\n")
    assert status == bool(examine(found))
    assert command(["doctor", str(tmp_path / "run"), "--json"]) == status
    assert json.loads(capsys.readouterr().out)["notes"] == [note]


def test_its_faults_are_found(tmp_path: Path) -> None:
    rules = {finding.rule for finding in examine(of_gpus(tmp_path / "run"))}
    assert {
        "small-batch",
        "small-chunks",
        "throttled-clocks",
        "no-peer-access",
        "allocator",
    } <= rules
