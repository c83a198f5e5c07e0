"""The last steps of a ledger as bars over time: for pages and reports.

However much happened, there are about as many bars as were asked for: where there would be more, three
quarters of them are the last ones, as they were; what came before is put together by columns that keep each row's
share of time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter

import msgspec

from bireme.observe.causes import Row
from bireme.observe.ledger import Ledger, Piece, RankLedger
from bireme.observe.timeline import Key

_US = 1000  # nanoseconds
_start = attrgetter("start_ns")


class Bar(msgspec.Struct, frozen=True, array_like=True):
    """[start_us, end_us) since the window began; the step that the rank was at, if any, and if it was one."""

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
    """`seconds` long, in which ranks were at `num_steps`. Bars are as they were from `whole_us` on; before, each
    `column_us` has a bar a row, as long as all of that row in it: shares of time are true, their order is not."""

    seconds: float
    ranks: list[GanttRank]
    num_steps: int = 0
    whole_us: int = 0
    column_us: int = 0

    @classmethod
    def of(cls, ledger: Ledger, most_bars: int, num_steps: int | None = None) -> Gantt:
        """Of all of a ledger, or of the end of it that holds the last `num_steps`; `most_bars` of all ranks."""
        start_ns = ledger.start_ns
        if num_steps is not None and ledger.ranks:
            start_ns = max(start_ns, _start_of_last(ledger.ranks[0], num_steps, start_ns))
        inside = [_since(rank.pieces, start_ns) for rank in ledger.ranks]
        is_more = sum(map(len, inside)) > most_bars
        whole_us = _whole_since(inside, most_bars - most_bars // 4) if is_more else 0
        num_rows = len({piece.row for pieces in inside for piece in pieces})
        num_columns = max(1, most_bars // 4 // max(1, num_rows * len(inside)))
        column_us = -(-whole_us // num_columns)
        return cls(
            seconds=(ledger.end_ns - start_ns) / 1e9,
            ranks=[
                GanttRank(rank.name, rank.stage, _bars(pieces, whole_us, column_us))
                for rank, pieces in zip(ledger.ranks, inside, strict=True)
            ],
            num_steps=len({it.key for pieces in inside for it in pieces} - {None}),
            whole_us=whole_us,
            column_us=column_us,
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


def _since(pieces: Sequence[Piece], start_ns: int) -> list[Piece]:
    """In their order, with times since then."""
    return [
        Piece(max(0, it.start_ns - start_ns), it.end_ns - start_ns, it.row, it.key)
        for it in sorted(pieces, key=_start)
        if it.end_ns > start_ns
    ]


def _whole_since(ranks: Sequence[Sequence[Piece]], most: int) -> int:
    """From when on there are at most so many pieces, in microseconds."""
    starts = sorted(piece.start_ns for pieces in ranks for piece in pieces)
    return -(-starts[-max(1, most)] // _US)


def _bars(pieces: Sequence[Piece], whole_us: int, column_us: int) -> list[Bar]:
    found: list[Bar] = []
    if column_us:
        for start_us, times in _columns(pieces, whole_us, column_us):
            _add_column(found, start_us, times)
    for piece in pieces:
        if piece.end_ns > whole_us * _US:
            _add(
                found, _bar(max(piece.start_ns, whole_us * _US), piece.end_ns, piece.row, piece.key)
            )
    return found


Times = Mapping[Row, tuple[int, set[Key | None]]]  # nanoseconds, of which steps


def _columns(pieces: Sequence[Piece], whole_us: int, column_us: int) -> Iterator[tuple[int, Times]]:
    """From the first to the one that ends when bars begin to be whole."""
    found: dict[int, dict[Row, tuple[int, set[Key | None]]]] = {}
    column_ns, whole_ns = column_us * _US, whole_us * _US
    for piece in pieces:
        at, end_ns = piece.start_ns, min(piece.end_ns, whole_ns)
        while at < end_ns:
            index = at // column_ns
            until = min(end_ns, (index + 1) * column_ns)
            times = found.setdefault(index * column_us, {})
            spent_ns, keys = times.get(piece.row, (0, set()))
            times[piece.row] = spent_ns + until - at, keys | {piece.key}
            at = until
    yield from sorted(found.items())


def _add_column(found: list[Bar], start_us: int, times: Times) -> None:
    at_ns = start_us * _US
    for row in sorted(times, key=list(Row).index):
        spent_ns, keys = times[row]
        key = next(iter(keys)) if len(keys) == 1 else None
        bar = _bar(at_ns, at_ns + spent_ns, row, key)
        if len(times) == 1:
            _add(found, bar)
        elif bar.start_us < bar.end_us:
            found.append(bar)
        at_ns += spent_ns


def _bar(start_ns: int, end_ns: int, row: Row, key: Key | None) -> Bar:
    return Bar(start_ns // _US, end_ns // _US, row, None if key is None else key[1])


def _add(found: list[Bar], bar: Bar) -> None:
    """As one bar, or as more of the last one."""
    last = found[-1] if found else None
    if bar.start_us == bar.end_us:
        return
    if last is not None and (last.row, last.step, last.end_us) == (bar.row, bar.step, bar.start_us):
        found[-1] = Bar(last.start_us, bar.end_us, bar.row, bar.step)
    else:
        found.append(bar)
