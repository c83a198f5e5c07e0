"""The evidence of an export of Nsight Systems (`nsys export --type sqlite`): what each GPU was at.

NCCL's kernels are collectives, all others work; where no kernel ran, the GPU waited for its host. Tables:
https://docs.nvidia.com/nsight-systems/2021.5/nsys-exporter/exported_data.html
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

from bireme.doctor.evidence import Evidence, RankFacts
from bireme.errors import UserError
from bireme.observe.causes import Row
from bireme.observe.told import ToldLedger, ToldRank

_KERNELS = """
    SELECT kernel.globalPid, kernel.deviceId, kernel.start, kernel.end, name.value
    FROM CUPTI_ACTIVITY_KIND_KERNEL AS kernel JOIN StringIds AS name ON name.id = kernel.shortName
    ORDER BY kernel.start
"""
_COLLECTIVE = "nccl"  # how its kernels' names begin

Interval = tuple[int, int]  # nanoseconds


def read_nsys(path: Path) -> Evidence:
    """UserError where the file is no such export, or holds no kernel."""
    work: dict[tuple[int, int], list[Interval]] = {}
    collectives: dict[tuple[int, int], list[Interval]] = {}
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            for process, device, start, end, name in database.execute(_KERNELS):
                kernels = collectives if name.lower().startswith(_COLLECTIVE) else work
                kernels.setdefault((process, device), []).append((start, end))
    except sqlite3.Error as error:
        raise UserError(
            f"{path} is no export of Nsight Systems with kernels: {error}; "
            "make it by nsys export --type sqlite"
        ) from None
    every = [*work.values(), *collectives.values()]
    if not every:
        raise UserError(f"{path} holds no kernel; trace CUDA: nsys profile -t cuda,nvtx")
    window = min(it[0][0] for it in every), max(end for it in every for _, end in it)
    places = sorted({*work, *collectives})
    ranks = [
        _told(f"device {device}, process {process}", work.get(place, ()), collectives.get(place, ()), window)
        for place in places
        for process, device in [place]
    ]  # fmt: skip
    return Evidence(
        source=str(path),
        ranks=[
            RankFacts(name=told.name, stage=0, device=f"cuda:{device}")
            for told, (_, device) in zip(ranks, places, strict=True)
        ],
        ledger=ToldLedger(seconds=(window[1] - window[0]) / 1e9, until_s=0.0, ranks=ranks),
    )


def _told(
    name: str, work: Sequence[Interval], collectives: Sequence[Interval], window: Interval
) -> ToldRank:
    """An instant counts once: work before collectives, these before waiting."""
    wall_ns, work_ns = window[1] - window[0], _union_ns(work)
    busy_ns = _union_ns(sorted([*work, *collectives]))
    shares = dict.fromkeys((row.value for row in Row), 0.0)
    shares[Row.COMPUTE] = work_ns / wall_ns
    shares[Row.COLLECTIVE_MOVE] = (busy_ns - work_ns) / wall_ns
    shares[Row.HOST] = 1 - busy_ns / wall_ns
    return ToldRank(name, 0, shares, {}, 0.0, False, "")


def _union_ns(intervals: Iterable[Interval]) -> int:
    """Of sorted intervals, which may overlap."""
    total, at = 0, 0
    for start, end in intervals:
        total += max(0, end - max(start, at))
        at = max(at, end)
    return total
