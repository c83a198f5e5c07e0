"""What every kept result says beside its numbers: machine, versions, commit and command."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bireme.planning.probe import hardware

RESULTS = Path(__file__).parent / "results"
_SWITCHES = ("NCCL_MULTI_RANK_GPU_ENABLE", "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES")


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """JSON-able facts about where and how this process runs."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "commit": _commit(),
        "hardware": {
            "cpu": hardware.cpu_model(),
            "num_cores": os.cpu_count(),
            "memory_bytes": hardware.memory_bytes(),
            "load_average_at_the_end": hardware.load_average(),
            **_gpus(),
        },
        "versions": {"python": platform.python_version(), **_versions(packages), **_nccl()},
        **_switches(),
    }


def _gpus() -> dict[str, Any]:
    """Their names and their driver, where there are any."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    gpus = [line.split(", ") for line in told.splitlines()]
    return {"gpus": [name for name, _ in gpus], "driver": gpus[0][1]}


def _nccl() -> dict[str, str]:
    found = hardware.nccl_version()
    return {} if found is None else {"nccl": found}


def _switches() -> dict[str, dict[str, str]]:
    """What lets ranks share a GPU, where it is set."""
    found = {name: os.environ[name] for name in _SWITCHES if name in os.environ}
    return {"environment": found} if found else {}


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _commit() -> str:
    """The commit, with '+' where files of it were changed; BIREME_COMMIT names that of a copy without git."""
    if given := os.environ.get("BIREME_COMMIT"):
        return given
    here = Path(__file__).parent
    try:
        git = ["git", "-C", str(here)]
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "../src"], check=False)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.returncode else "")


def write(name: str, packages: Sequence[str], result: Mapping[str, Any]) -> Path:
    """Keeps a result under benchmarks/results, in place of what was kept there, and says so."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**environment(packages), **result}, indent=1) + "\n")
    print(f"kept as {path}", file=sys.stderr)
    return path
