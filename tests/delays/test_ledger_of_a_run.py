"""`bireme generate --ledger` and `bireme ledger` of what really ran, to which a busy machine adds time of nobody's."""

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
