"""What nvidia-smi says of clocks, read; a stand-in on the path says it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bireme.bench.clocks import rank_clocks, watched_clocks

SLOW = "GPU-aa, 1200, Active, Active, Not Active, Not Active"
FAST = "GPU-aa, 1980, Not Active, Not Active, Not Active, Not Active"
OTHER = "GPU-bb, 345, Active, Not Active, Active, Not Active"


def test_shares_are_of_the_times_at_which_it_was_asked() -> None:
    found = rank_clocks(1, "aa", [SLOW, OTHER, FAST, FAST, OTHER, FAST, "GPU-aa, 19"])
    assert found is not None
    assert (found.rank, found.num_samples, found.least_mhz, found.most_mhz) == (1, 4, 1200, 1980)
    assert found.slowdowns == {"hw_slowdown": 0.25, "hw_thermal_slowdown": 0.25}
    assert rank_clocks(0, "cc", [SLOW]) is None


def test_it_is_asked_as_long_as_steps_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, pipe = tmp_path / "told", tmp_path / "ready"
    os.mkfifo(pipe)
    command = tmp_path / "nvidia-smi"
    command.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > {told}\necho "{SLOW}"\necho > {pipe}\nexec tail -f /dev/null\n'
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with watched_clocks(["cuda:0"]) as clocks:
        pipe.read_text()
    assert clocks.lines == [SLOW]
    assert all(
        it.startswith(("--query-gpu=uuid", "--format=", "--loop-ms="))
        for it in told.read_text().split()
    )


def test_of_cpus_nobody_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with watched_clocks(["cpu", "cpu"]) as clocks:
        pass
    assert clocks.of_ranks(["cpu", "cpu"]) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    with watched_clocks(["cuda:0"]) as clocks:
        pass
    assert clocks.lines == []
