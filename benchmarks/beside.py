"""Peers that are measured in the same run as Bireme, each in a process, and where wanted an environment, of its own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PEERS = Path(__file__).parent / "peers"


def told_by_peer(
    name: str, python: str, arguments: Sequence[str], environment: Mapping[str, str]
) -> dict[str, Any]:
    """What `peers/NAME_peer.py` found, under an interpreter that has the peer; RuntimeError with the end of what it
    said where it failed."""
    done = subprocess.run(
        [python, str(PEERS / f"{name}_peer.py"), *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"{name} failed with {done.returncode}: {done.stderr[-2000:]}")
    told: dict[str, Any] = json.loads(lines[-1])
    return told
