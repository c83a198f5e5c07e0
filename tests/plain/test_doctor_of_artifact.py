"""What is found of a sharded checkpoint, and of the certificates beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bireme.checkpoint.manifest import read_manifest
from bireme.cli import run
from bireme.doctor.files import Cut, certified

TP2: Cut = ((2,), (8,))


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    assert run(["shard", "demo", str(folder), "-tp", "2"]) == 0
    return folder


def put_certificate(folder: Path, **more: Any) -> None:
    """That the model is another, of layout tp 2."""
    numbers = dict.fromkeys(
        ["max_difference", "mean_difference", "spread", "relative_difference", "tolerance", "relative_mean",
         "mean_tolerance", "prefill_agreement", "decode_agreement"], 1.0
    )  # fmt: skip
    counts = dict.fromkeys(
        ["num_prompts", "num_prefill_positions", "num_decode_positions", "num_excused", "num_not_finite"], 1
    )  # fmt: skip
    words = dict.fromkeys(["model", "layout", "dtype", "device", "reference"], "x")
    told = {"widths": [2], "layers_per_stage": [8], "departure": None, "departure_unknown": None}
    found = {**numbers, **counts, **words, **told, "is_same": False, **more}
    (folder / "certificate-x.json").write_text(json.dumps(found))


def doctor(artifact: Path, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    """Rules and notes."""
    capsys.readouterr()
    status = run(["doctor", str(artifact), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert status == bool(told["findings"])
    return [finding["rule"] for finding in told["findings"]], told["notes"]


def test_bytes_of_its_ranks_are_held_against_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for cut, rules in (("7,1", ["uneven-memory"]), ("4,4", [])):
        folder = tmp_path / cut
        assert run(["shard", "demo", str(folder), "--layers-per-stage", cut]) == 0
        assert doctor(folder, capsys) == (rules, [])


@pytest.mark.parametrize("has_hash", [False, True])
def test_a_certificate_of_these_files_counts(
    artifact: Path, has_hash: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or of earlier versions, which say nothing of files."""
    put_certificate(artifact, **({"artifact": read_manifest(artifact).xxh3} if has_hash else {}))
    assert doctor(artifact, capsys) == (["wrong-model"], [])


@pytest.mark.parametrize("is_same", [False, True])
def test_a_certificate_of_other_files_is_left_aside(
    artifact: Path, is_same: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    put_certificate(artifact, artifact="0123456789abcdef", is_same=is_same)
    rules, (note,) = doctor(artifact, capsys)
    assert rules == []
    assert "hashes to 0123456789abcdef" in note
    assert read_manifest(artifact).xxh3 in note


def test_a_run_answers_for_its_own_cut_alone(artifact: Path) -> None:
    put_certificate(artifact)
    assert len(certified(artifact, TP2).departures) == 1
    assert certified(artifact, ((1, 1), (4, 4))).departures == []


def test_what_verify_writes_names_the_artifact(artifact: Path) -> None:
    arguments = ["--dtype", "float32", "--num-prompts", "1", "--num-decode", "1"]
    assert run(["verify", str(artifact), "-tp", "2", *arguments]) == 0
    (path,) = artifact.glob("certificate-*.json")
    told = json.loads(path.read_text())
    assert told["artifact"] == read_manifest(artifact).xxh3
    assert (tuple(told["widths"]), tuple(told["layers_per_stage"])) == TP2
