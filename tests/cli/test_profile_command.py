"""`bireme profile`, of what really ran: four ranks, two stages, through the command line."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bireme.checkpoint.hub import DEMO
from bireme.cli import run
from bireme.observe.causes import Row
from bireme.observe.run_folder import RunFolder
from bireme.trace import SpanKind

BATCH, INPUT_LEN, OUTPUT_LEN = 4, 24, 8
WORKLOAD = [
    "--batch", str(BATCH), "--input-len", str(INPUT_LEN), "--output-len", str(OUTPUT_LEN)
]  # fmt: skip
CLUSTER = """format_version = 1
[[nodes]]
name = "box"
[[nodes.devices]]
name = "cpu0"
kind = "cpu"
memory_bytes = 1000000000
memory_bytes_per_s = 1e10
flop_per_s = { float32 = 1e11 }
[[nodes.devices]]
name = "cpu1"
kind = "cpu"
memory_bytes = 1000000000
flop_per_s = { float32 = 1e11 }
[[groups]]
devices = ["box/cpu0", "box/cpu1"]
transport = "shared memory"
all_reduce = [[1024, 1e-5], [1048576, 1e-3]]
"""


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """One run, which all tests look at."""
    folder = tmp_path_factory.mktemp("profile")
    (folder / "cluster.toml").write_text(CLUSTER)
    out = folder / "run"
    arguments = [
        "profile", DEMO, "-tp", "2", "-pp", "2", "--dtype", "float32", *WORKLOAD, "--kernels",
        "--batches", "2,1,8", "--chunks", "16,64", "--cluster", str(folder / "cluster.toml"), "-o", str(out),
    ]  # fmt: skip
    assert run(arguments) == 0
    found = RunFolder(out)
    assert found.about.command == ["bireme", *arguments]
    return found


def test_it_says_what_ran(profiled: RunFolder) -> None:
    about = profiled.about
    assert about.layout.widths == (2, 2)
    assert [(rank.stage, rank.tp_rank) for rank in about.layout.ranks] == [
        (0, 0), (0, 1), (1, 0), (1, 1),
    ]  # fmt: skip
    assert about.layout.names == [rank.name for rank in profiled.recorded.ranks]
    assert sum(about.layout.layers_per_stage) == about.model.config.num_layers  # type: ignore[union-attr]
    assert about.settings.transport == "shared memory"
    assert about.hardware.num_cores >= about.settings.num_threads >= 1


def test_its_ledger_is_what_the_ledger_command_says(
    profiled: RunFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    assert run(["ledger", str(profiled.path / "trace.json"), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert run(["ledger", str(profiled.path), "--json"]) == 0  # of the folder
    assert json.loads(capfd.readouterr().out) == told
    ledger = profiled.ledger
    assert told["seconds"] == ledger.told.seconds == profiled.profile.seconds
    for rank, exact, other in zip(told["ranks"], ledger.ranks, ledger.told.ranks, strict=True):
        assert rank["shares"] == other.shares
        assert rank["late"] == other.late
        assert sum(exact.ns.values()) == exact.wall_ns
        for row in Row:
            assert exact.ns[row] / exact.wall_ns == rank["shares"][row.value]


def test_tokens_and_steps_are_those_of_the_workload(profiled: RunFolder) -> None:
    found = profiled.profile
    assert found.is_whole
    assert found.throughput.num_input_tokens == BATCH * INPUT_LEN
    assert found.throughput.num_output_tokens == BATCH * OUTPUT_LEN
    assert len(found.latency.requests) == BATCH
    for one in found.latency.requests:
        assert 0 <= one.queue_s <= one.ttft_s <= one.e2e_s <= found.throughput.elapsed_s
    assert found.num_steps == len(found.steps)
    tokens = sum(step.num_tokens for step in found.steps)
    assert tokens == BATCH * (INPUT_LEN + OUTPUT_LEN - 1)  # the last one is not fed back
    assert sum(step.num_sampled for step in found.steps) == BATCH * OUTPUT_LEN
    assert max(step.cache_usage for step in found.steps) > 0
    told = sorted(it.start_ns for it in profiled.recorded.engine if it.kind is SpanKind.SUBMIT)
    for step, start_ns in zip(found.steps, told, strict=True):  # noted just before it is told
        assert -5e-3 < step.time_s - start_ns / 1e9 <= 0


def test_collectives_are_all_there_and_held_against_the_ceiling(profiled: RunFolder) -> None:
    sizes = profiled.profile.collectives
    for stage in (0, 1):
        ranks = [rank for rank in profiled.recorded.ranks if rank.stage == stage]
        for kind in (SpanKind.ALL_REDUCE, SpanKind.ALL_GATHER):
            spans = [it for rank in ranks for it in rank.spans if it.kind is kind]
            its = [it for it in sizes if (it.stage, it.kind) == (stage, kind.name.lower())]
            assert sum(it.total_bytes for it in its) * 2 == sum(it.num_bytes for it in spans)
            seconds = sum(it.end_ns - it.start_ns for it in spans) / 1e9
            assert sum(it.time_s for it in its) * 2 == pytest.approx(seconds)
    for size in sizes:
        assert (size.ceiling_bytes_per_s is not None) == (size.kind == "all_reduce")
    edges = {(it.src_stage, it.dst_stage) for it in profiled.profile.messages}
    assert edges == {(0, 1), (1, 0)}


def test_every_layer_is_timed_on_every_rank_that_holds_it(profiled: RunFolder) -> None:
    found = profiled.profile
    for rank in profiled.about.layout.ranks:
        ends = {"embedding"} if rank.stage == 0 else {"head"}
        layers = {*map(str, range(*rank.layers)), *ends}
        for phase in ("prefill", "decode"):
            its = [it for it in found.layers if (it.rank, it.phase) == (rank.rank, phase)]
            assert {it.layer for it in its} == layers
            assert all(it.time_s >= it.count * it.median_s / 2 > 0 for it in its)


def test_memory_is_told_by_kind(profiled: RunFolder) -> None:
    for one in profiled.profile.memory:
        assert one.weight_bytes == pytest.approx(one.weight_resident_bytes, rel=0.1)
        assert 0 < one.cache_resident_bytes < one.cache_bytes
        assert one.activation_bytes is not None
        assert 0 < one.activation_bytes < one.planned_step_bytes
        assert one.communication_bytes > 0
        assert one.other_bytes > 50e6  # python and torch
        assert one.how.keys() == {"weights", "cache", "activations", "communication", "other"}


def test_rates_are_of_all_tokens(profiled: RunFolder) -> None:
    found = profiled.profile
    for rank in range(4):
        rates = {it.phase: it for it in found.rates if it.rank == rank}
        assert rates["decode"].num_tokens == BATCH * (OUTPUT_LEN - 1)
        assert rates["prefill"].num_tokens == BATCH * INPUT_LEN
        for rate in rates.values():
            assert rate.flop_per_s == pytest.approx(rate.flop / rate.compute_s)
            assert rate.ceiling_flop_per_s == 1e11
    assert any("is of box, and this is" in note for note in found.notes)


def test_kernels_are_traced_on_every_rank(profiled: RunFolder) -> None:
    for rank in range(4):
        path = profiled.kernel_trace(rank)
        assert path is not None
        assert json.loads(path.read_bytes())["traceEvents"]
        its = [it for it in profiled.profile.operators if it.rank == rank]
        assert any("linear" in it.name for it in its)
        assert [it.self_s for it in its] == sorted((it.self_s for it in its), reverse=True)


def test_other_sizes_are_measured_from_small_to_large(profiled: RunFolder) -> None:
    found = profiled.profile
    assert [one.size for one in found.batches] == [1, 2, 8]
    assert [one.size for one in found.chunks] == [16, 64]
    for one in [*found.batches, *found.chunks]:
        assert one.total_tokens_per_s > one.output_tokens_per_s > 0
        assert one.itl_s["p50"] <= one.e2e_s["p50"]
        assert one.ttft_s["p50"] <= one.e2e_s["p50"]
    assert found.clocks == []  # of GPUs


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--batch", "0"], "batch=0 must be at least 1"),
        (["--output-len", "5000"], "1024"),
        (["--num-warmup", "-1"], "num_warmup=-1 must be at least 0"),
        (["--batches", "1,0"], "batches 1,0 holds 0; the smallest is 1"),
        (["--batches", "1,128"], "batches: 128 exceeds max_num_seqs=64"),
        (["--batches", "100000"], "give at most 64, or a larger --max-num-seqs"),
        (["--batches", "4", "--max-num-seqs", "2"], "batches: 4 exceeds max_num_seqs=2"),
        (["--chunks", "4096"], "4096 exceeds max_num_batched_tokens=2048"),
        (["--cluster", "missing.toml"], "missing.toml cannot be read"),
        (["-tp", "99"], "tensor_parallel_size=99 exceeds"),
        (["-o", __file__], "it is no folder"),
        (["-o", str(Path(__file__).parent)], "holds what is of no run"),
    ],
)
def test_wrong_input_is_told_before_any_process_starts(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["profile", DEMO, *arguments]) == 2
    found = capfd.readouterr().err
    assert told in found
    assert found.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_nsys_its_command_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(["profile", DEMO, "--nsys", "-o", str(tmp_path / "a run")]) == 2
    found = capfd.readouterr()
    assert "nsys is not installed" in found.err
    words = shlex.split(found.out)
    assert words[:5] == ["nsys", "profile", "-t", "cuda,nvtx", "--cuda-graph-trace=node"]
    assert words[words.index("-o") + 1] == str(tmp_path / "a run" / "nsys")
    assert words[-6:] == ["-m", "bireme", "profile", DEMO, "-o", str(tmp_path / "a run")]


def fake_nsys(folder: Path) -> None:
    """Says what it is given, and ends with 7."""
    fake = folder / "nsys"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 7\n')
    fake.chmod(0o755)


@pytest.mark.parametrize(
    ("has_nsys", "arguments"),
    [(False, []), (True, ["--output-len", "5000"]), (True, ["-tp", "99"])],
)
def test_an_earlier_run_stays_where_nsys_cannot_run(
    has_nsys: bool, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_json = tmp_path / "run" / "run.json"
    run_json.parent.mkdir()
    run_json.write_text("an earlier run")
    if has_nsys:
        fake_nsys(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(["profile", DEMO, "--nsys", "-o", str(run_json.parent), *arguments]) == 2
    assert run_json.read_text() == "an earlier run"


def test_with_nsys_it_runs_under_it(tmp_path: Path) -> None:
    fake_nsys(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "bireme", "profile", DEMO, "--nsys", "-o", str(tmp_path / "run")],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 7, done.stderr
    words = done.stdout.split("\n")
    assert words[:3] == ["profile", "-t", "cuda,nvtx"]
    assert sys.executable in words
    assert "--nsys" not in words
