"""The evidence of an export of Nsight Systems (`nsys export --type sqlite`): what each GPU was at.

NCCL's kernels are collectives (a send or receive is a transfer), all others work; where no kernel ran, the GPU
waited for its host. Tables:
https://docs.nvidia.com/nsight-systems/2021.5/nsys-exporter/exported_data.html
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
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
_ROWS = (Row.COMPUTE, Row.COLLECTIVE_MOVE, Row.TRANSFER)

Interval = tuple[int, int]  # nanoseconds


def read_nsys(path: Path) -> Evidence:
    """UserError where the file is no such export, or holds no kernel."""
    kernels: dict[Row, dict[tuple[int, int], list[Interval]]] = {row: {} for row in _ROWS}
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            for process, device, start, end, name in database.execute(_KERNELS):
                kernels[_row(name)].setdefault((process, device), []).append((start, end))
    except sqlite3.Error as error:
        raise UserError(
            f"{path} is no export of Nsight Systems with kernels: {error}; "
            "make it by nsys export --type sqlite"
        ) from None
    every = [it for of_row in kernels.values() for it in of_row.values()]
    if not every:
        raise UserError(f"{path} holds no kernel; trace CUDA: nsys profile -t cuda,nvtx")
    window = min(it[0][0] for it in every), max(end for it in every for _, end in it)
    places = sorted({place for of_row in kernels.values() for place in of_row})
    ranks = [
        _told(
            f"device {place[1]}, process {place[0]}",
            {row: of_row.get(place, ()) for row, of_row in kernels.items()},
            window,
        )
        for place in places
    ]
    return Evidence(
        source=str(path),
        is_layout_known=False,
        ranks=[
            RankFacts(name=told.name, stage=0, device=f"cuda:{device}")
            for told, (_, device) in zip(ranks, places, strict=True)
        ],
        ledger=ToldLedger(seconds=(window[1] - window[0]) / 1e9, until_s=0.0, ranks=ranks),
    )


def _row(name: str) -> Row:
    """By how NCCL names its kernels: a send or receive is between stages."""
    if not name.lower().startswith("nccl"):
        return Row.COMPUTE
    return Row.TRANSFER if "SendRecv" in name else Row.COLLECTIVE_MOVE


def _told(name: str, kernels: Mapping[Row, Sequence[Interval]], window: Interval) -> ToldRank:
    """An instant counts once: work before collectives, these before messages, these before waiting."""
    wall_ns, known_ns = window[1] - window[0], 0
    shares = dict.fromkeys((row.value for row in Row), 0.0)
    until: list[Interval] = []
    for row in _ROWS:
        until = sorted([*until, *kernels[row]])
        all_ns = _union_ns(until)
        shares[row] = (all_ns - known_ns) / wall_ns
        known_ns = all_ns
    shares[Row.HOST] = 1 - known_ns / wall_ns
    return ToldRank(name, 0, shares, {}, 0.0, False, "")


def _union_ns(intervals: Iterable[Interval]) -> int:
    """Of sorted intervals, which may overlap."""
    total, at = 0, 0
    for start, end in intervals:
        total += max(0, end - max(start, at))
        at = max(at, end)
    return total
