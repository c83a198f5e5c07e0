"""Files that a command writes: never one of the user's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bireme.chrome_trace import Recorded, chrome_trace
from bireme.cli import run
from bireme.engine.pool import WorkerPool

CERTIFICATE = {"model": "demo", "layout": "tp 2 x pp 1", "is_same": True}
TRACE = chrome_trace(Recorded((), ()))
OLD_TRACE = {"traceEvents": [], "displayTimeUnit": "ms"}
VERIFY = ["verify", "demo", "--out"]
GENERATE = ["generate", "demo", "The", "--max-tokens", "1", "-q", "--trace"]


@pytest.mark.parametrize("command", [VERIFY, GENERATE], ids=["verify", "generate"])
@pytest.mark.parametrize(
    "held", ["a thesis", "[1]", "{}", '{"format": "bireme-sharded-checkpoint"}', '{"prompt": "x"}']
)
def test_a_file_of_the_users_own_is_refused_and_kept_before_any_process_starts(
    command: list[str],
    held: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(WorkerPool, "take", None)
    path = tmp_path / "mine.json"
    path.write_text(held)
    assert run([*command, str(path)]) == 2
    said = capsys.readouterr().err
    assert f"{path} is there and is no " in said
    assert "name another file, or remove it" in said
    assert path.read_text() == held


@pytest.mark.parametrize(
    ("command", "other"), [(VERIFY, TRACE), (GENERATE, CERTIFICATE)], ids=["verify", "generate"]
)
def test_a_trace_is_no_certificate_and_the_other_way_round(
    command: list[str], other: dict[str, object], tmp_path: Path
) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps(other))
    assert run([*command, str(path)]) == 2
    assert json.loads(path.read_text()) == other


def test_a_trace_over_the_prompts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "The"}\n')
    assert run([*GENERATE, str(path), "--prompts-file", str(path)]) == 2
    assert path.read_text() == '{"prompt": "The"}\n'


def test_what_is_no_regular_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "null"
    path.symlink_to("/dev/null")
    for command in (VERIFY, GENERATE):
        assert run([*command, str(path)]) == 2
        assert f"{path} cannot be written: it is no regular file" in capsys.readouterr().err
    assert path.is_symlink()


@pytest.mark.parametrize(
    "held", [json.dumps(TRACE), json.dumps(OLD_TRACE), ""], ids=["a trace", "old", "nothing"]
)
def test_an_older_trace_is_replaced(held: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(held)
    assert run([*GENERATE, str(path)]) == 0
    assert len(json.loads(path.read_text())["traceEvents"]) > 2


def test_an_older_certificate_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(CERTIFICATE))
    assert run([*VERIFY, str(path), "--num-prompts", "1", "--num-decode", "1"]) == 0
    assert json.loads(path.read_text())["num_prompts"] == 1
