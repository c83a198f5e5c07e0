"""Hosts that are checked together, each a process: `bireme doctor --preflight`, as people run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COMMAND = [sys.executable, "-m", "bireme", "doctor", "--preflight", "--device", "cpu", "--json"]
ANSWER_S = 120


@dataclass(frozen=True)
class Place:
    """Where a host's process runs: the words before its command, its address, and what is in its environment."""

    address: str
    within: Sequence[str] = ()
    environment: Mapping[str, str] | None = None
    arguments: Sequence[str] = ()

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.within, *COMMAND, *arguments, *self.arguments],
            env={**os.environ, **(self.environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@dataclass(frozen=True)
class Said:
    """By one host."""

    status: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def rules(self) -> list[str]:
        return [finding["rule"] for finding in self.report["findings"]]


def begin(first: Place, *arguments: str) -> tuple[subprocess.Popen[str], str]:
    """The host that listens, and where."""
    process = first.start("--listen", first.address, "--host-name", "first", *arguments)
    assert process.stderr is not None
    line = process.stderr.readline()
    assert line.startswith("bireme: listening at "), line + process.stderr.read()
    return process, line.rpartition(" ")[2].strip()


def end(process: subprocess.Popen[str]) -> Said:
    out, err = process.communicate(timeout=ANSWER_S)
    return Said(process.returncode, out, err)


def check_together(first: Place, second: Place) -> tuple[Said, Said]:
    """What both say."""
    listening, place = begin(first)
    coming = second.start("--join", place, "--host-name", "second")
    return end(listening), end(coming)
