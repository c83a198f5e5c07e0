"""What `bireme ledger` says of what has no ledger; what it says of a run: tests/delays/test_ledger_of_a_run.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from bireme.cli import run


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
