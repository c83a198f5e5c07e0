"""A report of a real run says what its folder says: `profile.json` and `ledger.json`, read as they are."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bireme.bench.throughput import ThroughputResult
from bireme.bench.workload import Workload
from bireme.checkpoint.hub import DEMO
from bireme.cli import run as command
from bireme.observe.run_folder import RunFolder
from bireme.report.data import run_data

Json = dict[str, Any]
BATCH, INPUT_LEN, OUTPUT_LEN = 4, 24, 8
OPTIONS = (
    "-tp", "2", "-pp", "2", "--dtype", "float32", "--batches", "2", "--chunks", "16",
    "--batch", str(BATCH), "--input-len", str(INPUT_LEN), "--output-len", str(OUTPUT_LEN),
)  # fmt: skip


@dataclass(frozen=True)
class Told:
    """What a report holds, as JSON, beside the files of the run."""

    report: Json
    profile: Json
    ledger: Json
    about: Json

    @property
    def figures(self) -> dict[str, str]:
        return dict(self.report["figures"])


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    out = tmp_path_factory.mktemp("report") / "run"
    assert command(["profile", DEMO, *OPTIONS, "-o", str(out)]) == 0
    report = json.loads(msgspec.json.encode(run_data(RunFolder(out))))
    files = (of_file(out / name) for name in ("profile.json", "ledger.json", "run.json"))
    return Told(report, *files)


def of_file(path: Path) -> Json:
    found: Json = json.loads(path.read_text())
    return found


def test_throughput_is_that_of_the_benchmark(told: Told) -> None:
    kept = told.profile["throughput"]
    same = ThroughputResult(
        Workload(num_prompts=BATCH, input_len=INPUT_LEN, output_len=OUTPUT_LEN),
        kept["elapsed_s"], BATCH * INPUT_LEN, BATCH * OUTPUT_LEN, kept["num_preemptions"],
    )  # fmt: skip
    assert same.total_tokens_per_s == kept["total_tokens_per_s"]
    assert same.output_tokens_per_s == kept["output_tokens_per_s"]
    usage = max(step["cache_usage"] for step in told.profile["steps"])
    assert told.figures == {
        "output": f"{same.output_tokens_per_s:.1f} tokens/s",
        "in all": f"{same.total_tokens_per_s:.1f} tokens/s",
        "requests": f"{same.requests_per_s:.2f} a second",
        "took": f"{kept['elapsed_s']:.2f} s",
        "preemptions": str(kept["num_preemptions"]),
        "KV cache": f"{usage:.1%} at most",
    }


def test_latencies_are_those_of_the_profile(told: Told) -> None:
    latency = told.profile["latency"]
    assert told.report["latency_s"] == {
        "to the first token": latency["ttft_s"],
        "between tokens": latency["itl_s"],
        "end to end": latency["e2e_s"],
        "in the queue": latency["queue_s"],
    }
    requests = latency["requests"]
    for name in ("ttft_s", "e2e_s", "queue_s"):
        mean = sum(it[name] for it in requests) / len(requests)
        assert latency[name]["mean"] == pytest.approx(mean)
    between = sum(it["e2e_s"] - it["ttft_s"] for it in requests)
    num_gaps = sum(it["num_output_tokens"] - 1 for it in requests)
    assert latency["itl_s"]["mean"] == pytest.approx(between / num_gaps)


def test_memory_is_that_of_the_profile(told: Told) -> None:
    for rank, shown, kept in zip(
        told.report["ranks"], told.report["memory"], told.profile["memory"], strict=True
    ):
        assert shown["name"] == rank["name"]
        assert shown["bytes"] == {
            "weights_held": kept["weight_resident_bytes"],
            "kv_held": kept["cache_resident_bytes"],
            "activations": kept["activation_bytes"] or 0,
            "communication": kept["communication_bytes"],
            "other": kept["other_bytes"],
        }
        assert shown["reserved_cache"] == kept["cache_bytes"]
        held = sum(shown["bytes"].values()) - kept["activation_bytes"]
        assert held == pytest.approx(kept["pss_bytes"], rel=0.01), "all that the process has"


def test_collectives_and_other_sizes_are_those_of_the_profile(told: Told) -> None:
    for name in ("collectives", "messages", "notes"):
        assert told.report[name] == told.profile[name], name
    assert told.report["collectives"]
    assert told.report["messages"]


def test_throughput_by_size_is_that_of_the_profile(told: Told) -> None:
    """The run's own size among the others."""
    about = told.about["settings"]["engine"]
    for name, own, rate in (
        ("batches", BATCH, "output_tokens_per_s"),
        ("chunks", about["max_num_batched_tokens"], "total_tokens_per_s"),
    ):
        expected = {
            it["size"]: (False, it[rate], it["ttft_s"], it["itl_s"], it["e2e_s"])
            for it in told.profile[name]
        }
        latency = told.profile["latency"]
        times = latency["ttft_s"], latency["itl_s"], latency["e2e_s"]
        expected[own] = (True, told.profile["throughput"][rate], *times)
        shown = {it.pop("size"): tuple(it.values()) for it in told.report[name]}
        assert shown == expected
        assert list(shown) == sorted(shown)


def test_the_command_can_be_given_to_a_shell(told: Told) -> None:
    assert shlex.split(dict(told.report["facts"])["command"]) == told.about["command"]


def test_the_ledger_is_that_of_the_run(told: Told) -> None:
    assert told.report["ledger"]["seconds"] == told.profile["seconds"]
    for shown, kept in zip(told.report["ledger"]["ranks"], told.ledger["ranks"], strict=True):
        assert shown["name"] == kept["name"]
        assert shown["shares"] == {row: ns / kept["wall_ns"] for row, ns in kept["ns"].items()}


def test_bars_add_up_to_the_ledger(told: Told) -> None:
    """But for the nanoseconds of each bar."""
    gantt = told.report["gantt"]
    assert gantt["seconds"] == pytest.approx(told.profile["seconds"])
    steps = {step for rank in gantt["ranks"] for *_, step in rank["bars"]} - {None}
    assert len(steps) == gantt["num_steps"] == told.profile["num_steps"]
    for shown, kept in zip(gantt["ranks"], told.ledger["ranks"], strict=True):
        for row, ns in kept["ns"].items():
            if row == "unattributed":  # what the bars leave
                continue
            spent_us = sum(end - start for start, end, it, _ in shown["bars"] if it == row)
            assert spent_us == pytest.approx(ns / 1e3, rel=0.01, abs=1.0 * len(shown["bars"])), row
