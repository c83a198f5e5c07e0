"""A run on disk: `run.json`, what it was and what was measured, and `trace.json`, every span of it.
`docs/run-folder.md` says what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from bireme.chrome_trace import Recorded, chrome_trace
from bireme.engine.service_messages import Stats
from bireme.engine.setup import Setup
from bireme.errors import UserError
from bireme.observe.collectives import CollectiveSize
from bireme.observe.told import ToldLedger

FORMAT = 1
RUN_NAME, TRACE_NAME = "run.json", "trace.json"


class CacheUse(msgspec.Struct, frozen=True):
    """While the run was measured: the largest share of the KV cache in use, the most requests that waited, and
    how many gave their blocks back."""

    most_used: float
    most_waiting: int
    num_preemptions: int


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """`result` has the keys of `bireme bench throughput --json`; `latency_s` percentiles by measure (`ttft`,
    `itl`, `e2e`), in seconds; `stats` is what the engine counted since its start."""

    bireme_run: int = FORMAT
    date: str
    command: str
    versions: dict[str, str]
    setup: Setup
    result: dict[str, Any]
    latency_s: dict[str, dict[str, float]]
    num_running: float
    cache: CacheUse
    stats: Stats
    ledger: ToldLedger
    collectives: list[CollectiveSize]


class _Version(msgspec.Struct):
    bireme_run: int


def check_run_folder(folder: Path) -> None:
    """UserError unless a run can be written there: it is not there, is empty, or holds an earlier run."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is no folder; name one for the run")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RUN_NAME).exists():
        raise UserError(f"{folder} holds other files; name a new folder, or that of an earlier run")
    if not folder.absolute().parent.is_dir():
        raise UserError(f"{folder} cannot be made: {folder.absolute().parent} is no folder")


def write_run(folder: Path, run: Run, recorded: Recorded) -> None:
    folder.mkdir(exist_ok=True)
    (folder / TRACE_NAME).write_bytes(msgspec.json.encode(chrome_trace(recorded)))
    (folder / RUN_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(run), indent=1))


def read_run(folder: Path) -> Run:
    """UserError where there is none, or one of another version."""
    path = folder / RUN_NAME
    try:
        body = path.read_bytes()
        found = msgspec.json.decode(body, type=_Version).bireme_run
        if found != FORMAT:
            raise UserError(f"{path} is of format {found}, and {FORMAT} is read; run it again")
        return msgspec.json.decode(body, type=Run)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; bireme profile writes one"
        ) from None
    except msgspec.DecodeError as error:
        raise UserError(f"{path} is no run of ours: {error}") from None
