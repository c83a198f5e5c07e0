"""The last steps of a ledger as bars over time: for pages and reports.

What would be shorter than a column is put together with its neighbours, so that there are at most two
bars a column and one more, however much happened; all others begin and end where they really did.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import msgspec

from bireme.observe.causes import Row
from bireme.observe.ledger import Ledger, Piece, RankLedger
from bireme.observe.timeline import Key

_start = attrgetter("start_ns")


class Bar(msgspec.Struct, frozen=True, array_like=True):
    """[start_us, end_us) since the window began; the step that the rank was at, if any."""

    start_us: int
    end_us: int
    row: Row
    step: int | None


class GanttRank(msgspec.Struct, frozen=True):
    """Bars in their order, without overlap; what they leave of the window is unattributed."""

    name: str
    stage: int
    bars: list[Bar]


class Gantt(msgspec.Struct, frozen=True):
    """`seconds` long. A bar that stands for several shows what took most of it."""

    seconds: float
    ranks: list[GanttRank]

    @classmethod
    def of(cls, ledger: Ledger, num_columns: int, num_steps: int | None = None) -> Gantt:
        """Of all of a ledger, or of the end of it that holds the last `num_steps`."""
        start_ns = ledger.start_ns
        if num_steps is not None and ledger.ranks:
            start_ns = max(start_ns, _start_of_last(ledger.ranks[0], num_steps, start_ns))
        column_ns = max(1, (ledger.end_ns - start_ns) // num_columns)
        return cls(
            seconds=(ledger.end_ns - start_ns) / 1e9,
            ranks=[
                GanttRank(rank.name, rank.stage, _bars(rank.pieces, start_ns, column_ns))
                for rank in ledger.ranks
            ],
        )


def _start_of_last(rank: RankLedger, num_steps: int, least_ns: int) -> int:
    """When the first of the last steps began; `least_ns` where there was none."""
    starts: dict[Key, int] = {}
    for piece in reversed(rank.pieces):
        if piece.key is None:
            continue
        if piece.key not in starts and len(starts) == num_steps:
            break
        starts[piece.key] = min(piece.start_ns, starts.get(piece.key, piece.start_ns))
    return min(starts.values(), default=least_ns)


def _bars(pieces: Sequence[Piece], start_ns: int, column_ns: int) -> list[Bar]:
    inside = sorted((it for it in pieces if it.end_ns > start_ns), key=_start)
    found: list[Bar] = []
    short: list[Piece] = []  # behind one another, to become one bar
    for piece in inside:
        if short and piece.start_ns > short[-1].end_ns:  # nothing is known of between
            _add(found, short, start_ns)
            short = []
        if piece.end_ns - piece.start_ns < column_ns:
            short.append(piece)
            if piece.end_ns - short[0].start_ns >= column_ns:
                _add(found, short, start_ns)
                short = []
        else:
            _add(found, short, start_ns)
            _add(found, (piece,), start_ns)
            short = []
    _add(found, short, start_ns)
    return found


def _add(found: list[Bar], pieces: Sequence[Piece], start_ns: int) -> None:
    """As one bar, or as more of the last one."""
    if not pieces:
        return
    row, step = _most(pieces)
    begin_us = max(0, pieces[0].start_ns - start_ns) // 1000
    end_us = (pieces[-1].end_ns - start_ns) // 1000
    last = found[-1] if found else None
    if begin_us == end_us:
        return
    if last is not None and (last.row, last.step, last.end_us) == (row, step, begin_us):
        found[-1] = Bar(last.start_us, end_us, row, step)
    else:
        found.append(Bar(begin_us, end_us, row, step))


def _most(pieces: Sequence[Piece]) -> tuple[Row, int | None]:
    """What took most of the time."""
    times: dict[tuple[Row, Key | None], int] = {}
    for piece in pieces:
        of = piece.row, piece.key
        times[of] = times.get(of, 0) + piece.end_ns - piece.start_ns
    row, key = max(times, key=times.__getitem__) if len(times) > 1 else of
    return row, None if key is None else key[1]
