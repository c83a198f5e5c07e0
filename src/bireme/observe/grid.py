"""A pipeline's time as lines of characters, a line a rank: for terminals."""

from __future__ import annotations

from bireme.observe.causes import Row
from bireme.observe.ledger import Ledger, Piece, RankLedger

SIGNS = {
    Row.COLLECTIVE_MOVE: "=",
    Row.COLLECTIVE_WAIT: "w",
    Row.TRANSFER: ">",
    Row.FILL_DRAIN: "/",
    Row.IMBALANCE: "<",
    Row.TOKEN_DEPENDENCY: "~",
    Row.STARVED: ".",
    Row.HOST: "h",
    Row.UNATTRIBUTED: "?",
}
LEGEND = (
    "0-9 compute, by step (its last digit); = collective; w wait for the group;\n"
    "> transfer; / fill, drain; < imbalance; ~ token dependency; . starved;\n"
    "h host; ? unattributed"
)


def grid(ledger: Ledger, num_columns: int) -> dict[str, str]:
    """By rank; each column shows what took most of its time. Empty lines for who needs none."""
    return {rank.name: _line(rank, ledger, num_columns) for rank in ledger.ranks}


def _line(rank: RankLedger, ledger: Ledger, num_columns: int) -> str:
    if not num_columns:
        return ""
    cells: list[dict[str, float]] = [{} for _ in range(num_columns)]
    width = (ledger.end_ns - ledger.start_ns) / num_columns
    for piece in rank.pieces:
        sign = _sign(piece)
        start, end = piece.start_ns - ledger.start_ns, piece.end_ns - ledger.start_ns
        first, last = int(start / width), min(int(end / width), num_columns - 1)
        if first == last:
            cells[first][sign] = cells[first].get(sign, 0.0) + end - start
            continue
        for index in range(first, last + 1):
            at = index * width
            share = max(0.0, min(end, at + width) - max(start, at))
            cells[index][sign] = cells[index].get(sign, 0.0) + share
    return "".join(max(cell, key=cell.__getitem__) if cell else "?" for cell in cells)


def _sign(piece: Piece) -> str:
    if piece.row is not Row.COMPUTE:
        return SIGNS[piece.row]
    assert piece.key is not None, "work is of a step"
    return str(piece.key[1] % 10)
