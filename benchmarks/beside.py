"""Peers that are measured in the same run as Bireme, each in a process, and where wanted an environment, of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

PEERS = Path(__file__).parent / "peers"


def told_by_peer(
    name: str, python: str, arguments: Sequence[str], environment: Mapping[str, str]
) -> dict[str, Any]:
    """What `peers/NAME_peer.py` found, under an interpreter that has the peer; RuntimeError with the end of what it
    said where it failed. It ends with this process, however that ends."""
    command = [python, str(PEERS / f"{name}_peer.py"), *arguments, "--ends-with-stdin"]
    reads, writes = os.pipe()
    try:
        with subprocess.Popen(
            command, stdin=reads, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **environment}, process_group=0,
        ) as process:  # fmt: skip
            try:
                said, errors = process.communicate()
            finally:  # whatever it has started too
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    finally:
        os.close(reads)
        os.close(writes)
    lines = [line for line in said.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        raise RuntimeError(f"{name} failed with {process.returncode}: {errors[-2000:]}")
    told: dict[str, Any] = json.loads(lines[-1])
    return told
