"""What is read of an export of Nsight Systems: kernels, whole CUDA graphs, and NVTX ranges of steps. Tables:
https://docs.nvidia.com/nsight-systems/2021.5/nsys-exporter/exported_data.html
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median_low

from bireme.errors import UserError
from bireme.trace import SpanKind

_KERNELS, _GRAPHS, _RANGES = (
    "CUPTI_ACTIVITY_KIND_KERNEL",
    "CUPTI_ACTIVITY_KIND_GRAPH_TRACE",
    "NVTX_EVENTS",
)
_ROWS = {
    _KERNELS: f"""
        SELECT done.globalPid, done.deviceId, done.start, done.end, name.value
        FROM {_KERNELS} AS done JOIN StringIds AS name ON name.id = done.shortName
    """,
    _GRAPHS: f"SELECT globalPid, deviceId, start, end, 'graph' FROM {_GRAPHS}",
    _RANGES: f"""
        SELECT 0, 0, done.start, done.end, COALESCE(done.text, name.value) AS called
        FROM {_RANGES} AS done LEFT JOIN StringIds AS name ON name.id = done.textId
        WHERE called = '{SpanKind.STEP.name.lower()}' AND done.end IS NOT NULL
    """,
}
_PAUSE_NS = 100_000_000  # between steps: what is shorter is within a pass,
_PAUSE_STEPS = 10  # and so is what is as long as so many usual gaps

Interval = tuple[int, int]  # nanoseconds


@dataclass(frozen=True)
class Done:
    """What one process's device did from `start` to `end`."""

    process: int
    device: int
    start: int
    end: int
    name: str


def read_export(path: Path) -> tuple[list[Done], list[Interval]]:
    """Kernels and graphs by their start, and the times in which steps went on, one after the other; UserError
    where the file is no such export."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
            found = {
                table: [_checked(path, table, row) for row in database.execute(query)]
                for table, query in _ROWS.items()
                if table in tables or table == _KERNELS
            }
    except sqlite3.Error as error:
        raise UserError(
            f"{path} is no export of Nsight Systems with kernels: {error}; "
            "make it by nsys export --type sqlite"
        ) from None
    done = sorted([*found[_KERNELS], *found.get(_GRAPHS, [])], key=lambda it: it.start)
    steps = sorted((step.start, step.end) for step in found.get(_RANGES, []))
    return done, list(_passes(steps))


def _checked(path: Path, table: str, row: tuple[object, ...]) -> Done:
    process, device, start, end, name = row
    if (
        isinstance(process, int)
        and isinstance(device, int)
        and isinstance(start, int)
        and isinstance(end, int)
        and isinstance(name, str)
        and start <= end
    ):
        return Done(process, device, start, end, name)
    raise UserError(
        f"{path} is damaged: {table} tells of {name!r} from {start!r} to {end!r} on device {device!r} of process "
        f"{process!r}, where times are whole nanoseconds and the end is no earlier; export it again"
    )


def _passes(steps: list[Interval]) -> Iterator[Interval]:
    """Of steps that follow one another; longer pauses are between them."""
    if not steps:
        return
    gaps = [max(0, after[0] - before[1]) for before, after in pairwise(steps)]
    pause_ns = max(_PAUSE_NS, _PAUSE_STEPS * median_low(gaps or [0]))
    start, until = steps[0]
    for step_start, step_end in steps[1:]:
        if step_start - until > pause_ns:
            yield start, until
            start = step_start
        until = max(until, step_end)
    yield start, until
