"""A report is one file that needs no other, and its figures are those of the run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import msgspec
import pytest
from runs import recorded_run

from bireme.cli import run as command
from bireme.observe.profile_records import RankMemory
from bireme.observe.run_folder import RunFolder, prepare_run_folder, write_run_folder
from bireme.report.document import is_report, report

HOSTILE = "</script><script>alert(1)</script> & <b>"


def memory_of(rank: int) -> RankMemory:
    return RankMemory(
        rank=rank, weight_bytes=100, cache_bytes=50, activation_bytes=None, communication_bytes=5,
        other_bytes=7, planned_step_bytes=9, weight_resident_bytes=100, cache_resident_bytes=10,
        rss_bytes=200, pss_bytes=190, shared_bytes=20, swapped_bytes=0, num_major_faults=0, how={},
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    about, recorded, ledger, profile = recorded_run()
    about = msgspec.structs.replace(about, command=["bireme", HOSTILE])
    profile = msgspec.structs.replace(profile, memory=[memory_of(0), memory_of(1)])
    prepare_run_folder(tmp_path / "run")
    return write_run_folder(tmp_path / "run", about, recorded, ledger, profile)


def held(page: str) -> list[dict[str, Any]]:
    found = re.findall(r'<script id="runs" type="application/json">(.*?)</script>', page, re.S)
    assert len(found) == 1
    runs: list[dict[str, Any]] = json.loads(found[0])
    return runs


def test_it_holds_all_that_it_needs(run: RunFolder) -> None:
    page = report([run])
    assert not re.search(
        r'(src|href)="|url\((?!#)|@import|fetch\(', page.replace("url(#", "url (#")
    )
    imports = json.loads(re.findall(r'<script type="importmap">(.*?)</script>', page)[0])["imports"]
    named = set(re.findall(r'from "(bireme/[\w.]+)"', page))
    assert named <= set(imports)
    assert all(url.startswith("data:text/javascript;base64,") for url in imports.values())


def test_what_a_run_says_ends_no_script(run: RunFolder) -> None:
    page = report([run])
    assert HOSTILE not in page
    assert f"bireme {shlex.quote(HOSTILE)}" in dict(held(page)[0]["facts"]).values()


def test_figures_are_those_of_the_run(run: RunFolder) -> None:
    (found,) = held(report([run]))
    assert found["ledger"] == msgspec.to_builtins(run.ledger.told)
    assert [rank["name"] for rank in found["gantt"]["ranks"]] == run.about.layout.names
    assert found["gantt"]["seconds"] == pytest.approx(run.profile.seconds)
    assert (
        dict(found["figures"])["output"] == f"{run.profile.throughput.output_tokens_per_s} tokens/s"
    )
    for rank, memory in zip(found["memory"], run.profile.memory, strict=True):
        assert sum(rank["bytes"].values()) == memory.total_bytes


def test_the_longest_bars_of_a_long_run_stay(run: RunFolder) -> None:
    """Each rank's bars add up to what its ledger says of its work."""
    (found,) = held(report([run]))
    for rank, ledger in zip(found["gantt"]["ranks"], run.ledger.ranks, strict=True):
        work_us = sum(end - start for start, end, row, _ in rank["bars"] if row == "compute")
        assert work_us == pytest.approx(ledger.ns["compute"] / 1000, rel=0.01)


def test_runs_are_side_by_side(run: RunFolder) -> None:
    assert len(held(report([run, run]))) == 2


def test_the_command_writes_a_report_anew_and_over_nothing_else(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    for _ in range(2):
        assert command(["report", str(run.path), "-o", str(out)]) == 0
        assert is_report(out)
    out.write_text("<html>mine</html>")
    for arguments, says in (
        ([str(run.path), "-o", str(out)], "is there and is no report"),
        ([str(run.path), "-o", str(tmp_path)], "it is a folder"),
        ([str(run.path), "-o", str(tmp_path / "no" / "x.html")], "is no folder"),
        ([str(tmp_path / "nowhere")], "is no folder"),
        ([str(run.path)] * 5, "5 runs are too many side by side; give at most 4"),
    ):
        assert command(["report", *arguments]) == 2
        assert says in capsys.readouterr().err
    assert out.read_text() == "<html>mine</html>"
