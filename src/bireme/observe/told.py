"""A ledger as it is told: to people, over HTTP, as JSON."""

from __future__ import annotations

from pathlib import Path

import msgspec

from bireme.chrome_trace import read_chrome_trace
from bireme.observe.causes import Row
from bireme.observe.gantt import Gantt
from bireme.observe.grid import grid
from bireme.observe.ledger import Ledger, make_ledger

NUM_COLUMNS = 100


class ToldRank(msgspec.Struct, frozen=True):
    """`shares` of the wall time by row; `late` by the rank that was waited for; `overlapped` is the share in
    which a send went on beside a later step's work; `is_sampled`: collectives were marked in some steps
    alone; `line` is its grid."""

    name: str
    stage: int
    shares: dict[str, float]
    late: dict[str, float]
    overlapped: float
    is_sampled: bool
    line: str


class ToldLedger(msgspec.Struct, frozen=True, omit_defaults=True):
    """`seconds` of wall time, up to `until_s` seconds before it was asked for; the last steps as bars for
    who asked for them."""

    seconds: float
    until_s: float
    ranks: list[ToldRank]
    gantt: Gantt | None = None

    @classmethod
    def of(
        cls,
        ledger: Ledger,
        until_s: float = 0.0,
        num_columns: int = NUM_COLUMNS,
        gantt: Gantt | None = None,
    ) -> ToldLedger:
        lines = grid(ledger, num_columns)
        return cls(
            seconds=(ledger.end_ns - ledger.start_ns) / 1e9,
            until_s=until_s,
            ranks=[
                ToldRank(
                    name=rank.name,
                    stage=rank.stage,
                    shares={row.value: rank.share(row) for row in Row},
                    late={name: ns / rank.wall_ns for name, ns in rank.late_ns.items()},
                    overlapped=rank.overlapped_ns / rank.wall_ns,
                    is_sampled=rank.is_sampled,
                    line=lines[rank.name],
                )
                for rank in ledger.ranks
            ],
            gantt=gantt,
        )

    def as_json(self) -> bytes:
        return msgspec.json.encode(self)


def told_of_trace(path: Path, num_columns: int = NUM_COLUMNS) -> ToldLedger:
    """UserError for what is no trace of ours."""
    return ToldLedger.of(make_ledger(read_chrome_trace(path)), num_columns=num_columns)
