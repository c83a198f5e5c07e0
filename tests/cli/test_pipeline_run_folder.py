"""`bireme pipeline -o RUN`: the best trial's run on disk, and what other commands say of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bireme.cli import run
from bireme.doctor.from_run import evidence_of
from bireme.observe.pipeline_records import ImageThroughput
from bireme.observe.run_folder import RunFolder
from bireme.observe.run_records import ImageWorkload
from bireme.parallel.pipeline import bubble_shares, forward_schedule, timeline
from bireme.trace import SpanKind

ROOT = Path(__file__).parent.parent
NETWORK = ["pipeline", "vision.networks:Network", "--image-size", "8", "--device", "cpu"]
SWEEP = ["--batch", "7", "--micro-batches", "2,3", "--batches", "2", "--runs", "2"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """One run, which all tests look at."""
    out = tmp_path_factory.mktemp("pipeline") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # ranks find `vision.networks` here
        assert run([*NETWORK, *SWEEP, "-pp", "2", "-o", str(out)]) == 0
    return RunFolder(out)


def test_it_says_what_ran(ran: RunFolder) -> None:
    about, workload = ran.about, ran.about.workload
    assert about.command[:2] == ["bireme", "pipeline"]
    assert isinstance(workload, ImageWorkload)
    assert (workload.batch, workload.image_size, workload.num_batches) == (7, 8, 2)
    assert workload.num_micro_batches in (2, 3)
    assert about.layout.names == [rank.name for rank in ran.recorded.ranks]
    assert [rank.layers for rank in about.layout.ranks] == [
        (0, about.layout.layers_per_stage[0]), (about.layout.layers_per_stage[0], 5),
    ]  # fmt: skip
    assert about.settings.engine is about.settings.num_cache_tokens is about.model.config is None
    assert about.model.num_parameters == 3 * 8 * 9 + 8 + 4 * (8 * 8 * 9 + 8) + 8 * 5 + 5


def test_its_trace_is_of_one_run_alone(ran: RunFolder) -> None:
    workload = ran.about.workload
    assert isinstance(workload, ImageWorkload)
    num_steps = workload.num_micro_batches * workload.num_batches
    assert ran.profile.num_steps == num_steps
    assert ran.profile.is_whole
    for rank in ran.recorded.ranks:
        steps = [span.step_id for span in rank.spans if span.kind is SpanKind.STEP]
        assert steps == list(range(steps[0], steps[0] + num_steps))
    assert ran.recorded.start_ns == 0
    assert ran.ledger.told.seconds == ran.profile.seconds
    throughput = ran.profile.throughput
    assert isinstance(throughput, ImageThroughput)
    assert throughput.elapsed_s < ran.profile.seconds
    assert throughput.num_images == 14
    for rank, bubble in zip(ran.ledger.ranks, throughput.bubbles, strict=True):
        work_s = (1 - bubble) * throughput.elapsed_s
        assert rank.ns["compute"] / 1e9 == pytest.approx(work_s, abs=1e-5)  # type: ignore[index]


def test_the_whole_sweep_is_there(ran: RunFolder) -> None:
    trials, throughput, workload = ran.profile.trials, ran.profile.throughput, ran.about.workload
    assert isinstance(throughput, ImageThroughput)
    assert isinstance(workload, ImageWorkload)
    assert [trial.num_micro_batches for trial in trials] == [2, 3]
    best = max(trials, key=lambda trial: trial.stages.images_per_s or 0.0)
    assert best.num_micro_batches == workload.num_micro_batches
    assert best.stages.elapsed_s == throughput.elapsed_s
    assert best.bubbles == throughput.bubbles
    for trial in trials:
        assert len(trial.one_device.runs_s) == len(trial.stages.runs_s) == 2
        assert trial.textbook_bubble == pytest.approx(1 / (2 * trial.num_micro_batches + 1))


def test_what_ranks_hold_and_hand_over_is_told(ran: RunFolder) -> None:
    memory = ran.profile.memory
    held = 4 * ran.about.model.num_parameters + 5 * 8  # and a buffer of whole numbers
    assert sum(one.weight_bytes for one in memory) == held
    for one in memory:
        assert one.weight_resident_bytes <= one.weight_bytes
        assert one.cache_bytes is one.cache_resident_bytes is None
        assert one.activation_bytes is not None
        assert one.other_bytes > 50e6  # python and torch
        assert one.how.keys() == {"weights", "activations", "communication", "other"}
    messages = ran.profile.messages
    assert {(it.src_stage, it.dst_stage) for it in messages} == {(0, 1)}
    assert sum(it.count for it in messages) == ran.profile.num_steps


def test_the_plan_is_what_the_schedule_makes_of_its_costs(ran: RunFolder) -> None:
    plan, workload, throughput = ran.plan, ran.about.workload, ran.profile.throughput
    assert plan is not None
    assert isinstance(workload, ImageWorkload)
    assert isinstance(throughput, ImageThroughput)
    sizes = {2: (4, 3), 3: (3, 2, 2)}[workload.num_micro_batches] * 2
    schedule = forward_schedule(2, len(sizes))
    costs = [stage.compute_s + stage.transfer_s for stage in plan.stages]
    times = timeline(schedule, lambda it: costs[it.stage] * sizes[it.micro_batch])
    assert plan.elapsed_s == pytest.approx(max(end for _, end in times.values()))
    assert plan.images_per_s == pytest.approx(14 / plan.elapsed_s)
    without_work = bubble_shares(schedule, times)
    assert all(
        found >= least - 1e-9 for found, least in zip(plan.bubbles, without_work, strict=True)
    )
    assert plan.ledger.seconds == pytest.approx(plan.elapsed_s)
    assert plan.ledger.gantt is not None
    for rank, bubble, bars in zip(
        plan.ledger.ranks, plan.bubbles, plan.ledger.gantt.ranks, strict=True
    ):
        assert rank.shares["compute"] == pytest.approx(1 - bubble, abs=1e-5)
        assert {bar.step for bar in bars.bars if bar.row == "compute"} == {
            span.step_id for span in ran.recorded.ranks[0].spans
        }


def test_more_micro_batches_that_were_slower_are_known(ran: RunFolder) -> None:
    workload = ran.about.workload
    assert isinstance(workload, ImageWorkload)
    assert evidence_of(ran).is_slower_with_more == (workload.num_micro_batches == 2)  # of 2 and 3


def test_other_commands_read_it(
    ran: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["ledger", str(ran.path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [rank["shares"] for rank in told["ranks"]] == [
        rank.shares for rank in ran.ledger.told.ranks
    ]
    assert run(["doctor", str(ran.path), "--json"]) in (0, 1)
    rules = {finding["rule"] for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert rules.isdisjoint({"small-cache", "uneven-memory", "few-requests"}), rules
    assert run(["report", str(ran.path), "-o", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    (shown,) = json.loads(re.findall(r'type="application/json">(.*?)</script>', page, re.S)[0])
    assert ran.plan is not None
    assert ran.plan.ledger.gantt is not None
    assert shown["plan"]["gantt"]["seconds"] == ran.plan.ledger.gantt.seconds
    assert [row[0] for row in shown["trials"]] == ["2", "3"]
    assert shown["latency_s"] == {}


def test_predicted_and_measured_are_printed_in_a_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    command = [*NETWORK, "--batch", "4", "--micro-batches", "2", "--runs", "1"]
    assert run([*command, "-o", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert re.search(
        r"^predicted from the plan: [\d.]+ ms, bubble [\d.]+%; "
        r"measured: [\d.]+ ms \([+-][\d.]+%\), bubble [\d.]+%$",
        shown.out,
        re.MULTILINE,
    )
    assert f"{tmp_path}: written" in shown.err


def test_a_folder_of_others_is_left_alone_and_nothing_is_written_where_nothing_fits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "thesis.tex").write_text("x")
    assert run([*NETWORK, "--batch", "4", "-o", str(tmp_path)]) == 2
    assert "is there and holds what is of no run" in capsys.readouterr().err
    out = tmp_path / "run"
    arguments = [*NETWORK, "--batch", "8", "--micro-batches", "1,8", "--memory-limit", "22KiB"]
    assert run([*arguments, "--runs", "1", "-o", str(out)]) == 0
    found = RunFolder(out).profile.trials
    assert [trial.stages.elapsed_s is None for trial in found] == [True, False]
    assert found[0].bubbles == []
    assert [trial.one_device.elapsed_s for trial in found] == [None, None]
    assert "does not fit" in dict(_figures(out, tmp_path / "r.html"))["over one device"]


def _figures(folder: Path, out: Path) -> list[tuple[str, str]]:
    assert run(["report", str(folder), "-o", str(out)]) == 0
    text = re.findall(r'type="application/json">(.*?)</script>', out.read_text(), re.S)[0]
    figures: list[tuple[str, str]] = json.loads(text)[0]["figures"]
    return figures
