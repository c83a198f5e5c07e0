"""`bireme profile` and what `bireme doctor` and `bireme ledger` say of the same run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bireme.cli import run
from bireme.observe.run_folder import Run, read_run
from bireme.observe.told import ToldLedger, told_of_trace

SMALL = ["--batch", "6", "--input-len", "8", "--output-len", "16"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert run(["profile", "demo", "-tp", "2", *SMALL, "-o", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def found(kept: Path) -> Run:
    return read_run(kept)


def test_it_keeps_what_ran_and_what_was_measured(found: Run) -> None:
    assert [rank.name for rank in found.setup.ranks] == [
        "rank 0 (stage 0, tp 0)", "rank 1 (stage 0, tp 1)",
    ]  # fmt: skip
    result = found.result
    assert (result["num_requests"], result["num_output_tokens"]) == (6, 96)
    assert (
        0 < found.latency_s["itl"]["p50"] <= found.latency_s["e2e"]["p50"] <= result["elapsed_time"]
    )
    assert 1 <= found.num_running <= 6
    assert found.cache.num_preemptions == 0
    assert all(rank.memory.weight_bytes > 0 for rank in found.stats.ranks)


def test_the_trace_gives_the_same_ledger(kept: Path, found: Run) -> None:
    assert told_of_trace(kept / "trace.json") == found.ledger


def test_collectives_are_those_of_the_ledger(found: Run) -> None:
    """A sum of each layer's halves and the embedding's, and what a token takes."""
    ledger = found.ledger
    for row, seconds in (
        ("collective_wait", sum(it.wait_s for it in found.collectives)),
        ("collective_move", sum(it.move_s for it in found.collectives)),
    ):
        told = sum(rank.shares[row] for rank in ledger.ranks) * ledger.seconds
        assert seconds == pytest.approx(told, rel=0.01, abs=1e-4)
    decode = next(it for it in found.collectives if it.num_bytes == 6 * 256 * 2)
    assert decode.kind == "all_reduce"
    assert decode.count % (2 * 8 + 1) == 0
    assert sum(decode.last.values()) == decode.count


def test_an_earlier_run_is_replaced_and_nothing_else(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("a thesis")
    for folder, says in (
        (tmp_path, "holds other files"),
        (tmp_path / "mine", "is no folder"),
        (tmp_path / "no" / "run", "no is no folder"),
    ):
        assert run(["profile", "demo", "-o", str(folder)]) == 2
        assert says in capsys.readouterr().err
    assert run(["profile", "demo", *SMALL, "-o", str(kept.parent / "other"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"]["num_requests"] == 6


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is no run of ours"),
        ("{}", "is no run of ours"),
        ('{"bireme_run": 99}', "is of format 99, and 1 is read"),
        ('{"bireme_run": 1}', "is no run of ours"),
    ],
)
def test_what_is_no_run_is_refused(
    content: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(content)
    assert run(["doctor", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "nowhere is no sharded checkpoint, and no run"),
        (["127.0.0.1:1"], "did you mean http://127.0.0.1:1"),
        (["http://127.0.0.1:1"], "127.0.0.1:1"),
        (["http://127.0.0.1:1", "--seconds", "0"], "seconds=0 must be above 0"),
    ],
)
def test_what_cannot_be_looked_at_is_said_in_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["doctor", *arguments]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert "\n" not in err.strip()


def test_a_ledger_is_what_it_is_read_as(found: Run) -> None:
    assert isinstance(found.ledger, ToldLedger)
    for rank in found.ledger.ranks:
        assert sum(rank.shares.values()) == pytest.approx(1.0)
        assert rank.shares["unattributed"] <= 0.01
