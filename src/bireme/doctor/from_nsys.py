"""The evidence of an export of Nsight Systems (`nsys export --type sqlite`): what each GPU was at.

NCCL's kernels are collectives (a send or receive is a transfer), all others work, and so are CUDA graphs that
were traced whole; where nothing ran, the GPU waited for its host. Where NVTX ranges tell of steps, only the time
is looked at in which they went on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bireme.doctor.evidence import Evidence, RankFacts
from bireme.doctor.nsys_export import Interval, read_export
from bireme.errors import UserError
from bireme.observe.causes import Row
from bireme.observe.kernel_trace import is_exchange, is_message
from bireme.observe.told import ToldLedger, ToldRank

_ROWS = (Row.COMPUTE, Row.COLLECTIVE_MOVE, Row.TRANSFER)


def read_nsys(path: Path) -> Evidence:
    """UserError where the file is no such export, or holds no kernel."""
    done, passes = read_export(path)
    if not done:
        raise UserError(f"{path} holds no kernel; trace CUDA: nsys profile -t cuda,nvtx")
    windows = passes or [(done[0].start, max(it.end for it in done))]
    wall_ns = sum(end - start for start, end in windows)
    if wall_ns == 0:
        raise UserError(
            f"{path} tells of no time: all that it holds takes 0 ns; profile for longer"
        )
    kernels: dict[Row, dict[tuple[int, int], list[Interval]]] = {row: {} for row in _ROWS}
    for it in done:
        kernels[_row(it.name)].setdefault((it.process, it.device), []).append((it.start, it.end))
    places = sorted({(it.process, it.device) for it in done})
    ranks = [
        _told(
            f"device {place[1]}, process {place[0]}",
            {row: list(_within(of_row.get(place, ()), windows)) for row, of_row in kernels.items()},
            wall_ns,
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
        ledger=ToldLedger(seconds=wall_ns / 1e9, until_s=0.0, ranks=ranks),
    )


def _row(name: str) -> Row:
    """By how NCCL, torch's symmetric memory and our sums name their kernels."""
    if not is_exchange(name):
        return Row.COMPUTE
    return Row.TRANSFER if is_message(name) else Row.COLLECTIVE_MOVE


def _within(intervals: Sequence[Interval], windows: Sequence[Interval]) -> Iterable[Interval]:
    """The parts of them that lie in windows; both by their start, windows apart from one another."""
    for start, end in windows:
        for first, last in intervals:
            if first < end and last > start:
                yield max(first, start), min(last, end)


def _told(name: str, kernels: Mapping[Row, Sequence[Interval]], wall_ns: int) -> ToldRank:
    """An instant counts once: work before collectives, these before messages, these before waiting."""
    known_ns = 0
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
