"""`bireme ledger` and `--ledger`, of what really ran."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bireme.checkpoint.hub import DEMO
from bireme.cli import run


def test_a_run_and_its_trace_are_accounted_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    trace = tmp_path / "trace.json"
    arguments = ["generate", DEMO, "import ", "-pp", "2", "--max-tokens", "20", "--quiet"]
    assert run([*arguments, "--ledger", "--trace", str(trace)]) == 0
    live = capfd.readouterr().err
    assert run(["ledger", str(trace)]) == 0
    read = capfd.readouterr().out
    for shown in (live, read):
        assert re.search(r"^token dependency +\d+\.\d +\d+\.\d$", shown, re.M)  # one request
        assert not re.search("^unattributed +[1-9]", shown, re.M)
        assert len(re.findall(r"^rank \d +\S{81}$", shown, re.M)) == 2


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("/nowhere.json", "/nowhere.json cannot be read: No such file or directory"),
        (__file__, "is no trace of bireme's"),
        (str(Path(__file__).parent), "is no run folder: it has no run.json"),
        ("127.0.0.1:1", "did you mean http://127.0.0.1:1"),
        ("http://127.0.0.1:1", "nothing answers at http://127.0.0.1:1: connection refused"),
        ("HTTP://127.0.0.1:1/v1", "connection refused"),
        ("http://127.0.0.1:notaport", "http://127.0.0.1:notaport does not answer"),
        ("http://[bad", "http://[bad does not answer"),
    ],
)
def test_what_has_no_ledger_is_named(
    source: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["ledger", source]) == 2
    found = capsys.readouterr().err
    assert told in found
    assert found.count("\n") == 1
