"""Where the output goes: a device that is full."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["inspect", "demo"],
        ["inspect", "demo", "--json"],
        ["generate", "demo", "The", "-q", "--max-tokens", "4"],
    ],
    ids=" ".join,
)
def test_a_full_output_is_one_line_and_status_1(arguments: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "bireme", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.stderr == "cannot write the output: No space left on device\n"
    assert done.returncode == 1
