"""Ledgers beside one another, for notebooks: their rows as a table, their time as bars on one scale.

The bars look as those of the live page and of reports, in light colours, and are one SVG that needs no script.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape

from bireme.observe.causes import Row
from bireme.observe.gantt import Bar, Gantt
from bireme.observe.ledger import Ledger

# As in drawing/rows.js and drawing/drawing.css.
STEP_COLOURS = ("#3a72b8", "#2a8a7c", "#a9572f", "#5d7a2c", "#9a4f86", "#4b6b88")
COLOURS = {
    Row.COLLECTIVE_MOVE: "#6b5ca8",
    Row.COLLECTIVE_WAIT: "#bcb3dc",
    Row.TRANSFER: "#c98a1b",
}
HATCHES = {
    Row.FILL_DRAIN: ("#8b95a0", "M-2,2 l4,-4 M0,8 l8,-8 M6,10 l4,-4"),
    Row.IMBALANCE: ("#c4601d", "M-2,6 l4,4 M0,0 l8,8 M6,-2 l4,4"),
    Row.TOKEN_DEPENDENCY: ("#b83a4b", "M0,0 l8,8 M0,8 l8,-8"),
    Row.HOST: ("#8a6d3b", "M2,0 v8 M6,0 v8"),
    Row.STARVED: ("#8b95a0", "M1,2 h2 M5,6 h2"),
    Row.UNATTRIBUTED: ("#8b95a0", "M0,2 h8 M0,6 h8"),
}
_INK, _SOFT, _PAGE, _BUBBLE = "#1b2127", "#58626c", "#fff", "#f0f1f3"

_WIDTH, _LEFT = 880, 64  # pixels, where bars begin
_BAR, _LINE, _CHARACTER = 20, 18, 7
_NUM_COLUMNS = (_WIDTH - _LEFT) // 2
_NUM_TICKS = 5
_THINNEST = 0.1


def rows_beside(ledgers: Mapping[str, Ledger]) -> str:
    """A line a row, a column a rank of each ledger, in percent of the time; rows that all lack are left out."""
    titles = {name: f"{name}, {_ms(_seconds(it))}" for name, it in ledgers.items()}
    widths = {
        name: max(8, -(-(len(titles[name]) + 2) // len(it.ranks))) for name, it in ledgers.items()
    }
    heads = [f"{titles[name]:>{widths[name] * len(it.ranks)}}" for name, it in ledgers.items()]
    columns = [(widths[name], rank) for name, it in ledgers.items() for rank in it.ranks]
    lines = [
        f"{'':16}" + "".join(heads),
        f"{'% of the time':16}"
        + "".join(f"{_short(rank.name):>{width}}" for width, rank in columns),
    ]
    for row in Row:
        if any(rank.ns[row] for _, rank in columns):
            cells = (f"{100 * rank.share(row):{width}.1f}" for width, rank in columns)
            lines.append(f"{_label(row):16}" + "".join(cells))
    return "\n".join(lines)


@dataclass(frozen=True)
class Picture:
    """An SVG that a notebook shows."""

    svg: str = field(repr=False)

    def _repr_svg_(self) -> str:
        return self.svg


def bars_beside(ledgers: Mapping[str, Ledger], num_steps: int | None = None) -> Picture:
    """Each ledger's ranks over time, or its last `num_steps`; steps are counted from the first that computes."""
    gantts = {name: Gantt.of(it, _NUM_COLUMNS, num_steps) for name, it in ledgers.items()}
    seconds = max(gantt.seconds for gantt in gantts.values())
    parts, at = [], 4
    for name, gantt in gantts.items():
        parts.append(_text(_LEFT, at + 12, f"{name}: {_ms(gantt.seconds)}", _INK))
        at += _LINE
        bars = [bar for rank in gantt.ranks for bar in rank.bars]
        first = min((it.step or 0 for it in bars if it.row is Row.COMPUTE), default=0)
        for rank in gantt.ranks:
            parts.append(_text(4, at + 14, _short(rank.name)))
            parts.append(_rect(_LEFT, at, (_WIDTH - _LEFT) * gantt.seconds / seconds, _BUBBLE))
            for bar in rank.bars:
                parts += _bar(bar, first, at, (_WIDTH - _LEFT) / (1e6 * seconds))
            at += _BAR + 4
        at += 4
    for tick in range(_NUM_TICKS + 1):
        x = _LEFT + (_WIDTH - _LEFT) * tick / _NUM_TICKS
        anchor = {0: "start", _NUM_TICKS: "end"}.get(tick, "middle")
        parts.append(_text(x, at + 12, _ms(seconds * tick / _NUM_TICKS), anchor=anchor))
    at += _LINE + 4
    used = {bar.row for it in gantts.values() for rank in it.ranks for bar in rank.bars}
    parts += _legend([row for row in Row if row in used], at)
    return Picture(_document(at + _LINE, parts))


def _document(height: int, parts: list[str]) -> str:
    patterns = "".join(
        f'<pattern id="hatch-{row}" width="8" height="8" patternUnits="userSpaceOnUse">'
        f'<rect width="8" height="8" fill="{_BUBBLE}"/>'
        f'<path d="{path}" stroke="{colour}" stroke-width="1.2" fill="none"/></pattern>'
        for row, (colour, path) in HATCHES.items()
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="system-ui, sans-serif" font-size="12">'
        f'<defs>{patterns}</defs><rect width="100%" height="100%" fill="{_PAGE}"/>{"".join(parts)}</svg>'
    )


def _bar(bar: Bar, first: int, y: int, scale: float) -> Iterator[str]:
    """With its number, where there is room; nothing of what would not be seen."""
    x, width = _LEFT + bar.start_us * scale, (bar.end_us - bar.start_us) * scale
    if width < _THINNEST:
        return
    step = None if bar.step is None else bar.step - first
    title = f"{_label(bar.row)}, step {step}" if step is not None and step >= 0 else _label(bar.row)
    yield _rect(
        x, y, width, _fill(bar.row, step or 0), f"{title}: {_ms((bar.end_us - bar.start_us) / 1e6)}"
    )
    if bar.row is Row.COMPUTE and width > _CHARACTER * len(str(step)) + 3:
        yield _text(x + width / 2, y + 14, str(step), _PAGE, "middle")


def _legend(rows: list[Row], y: int) -> Iterator[str]:
    x = float(_LEFT)
    for row in rows:
        label = "compute, by step" if row is Row.COMPUTE else _label(row)
        yield _rect(x, y, 14, _fill(row, 0), height=10)
        yield _text(x + 19, y + 10, label)
        x += 19 + _CHARACTER * (len(label) + 2)


def _fill(row: Row, step: int) -> str:
    if row is Row.COMPUTE:
        return STEP_COLOURS[step % len(STEP_COLOURS)]
    return f"url(#hatch-{row})" if row in HATCHES else COLOURS[row]


def _rect(x: float, y: float, width: float, fill: str, title: str = "", height: int = _BAR) -> str:
    inside = f"<title>{escape(title)}</title>" if title else ""
    return f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}" fill="{fill}">{inside}</rect>'


def _text(x: float, y: float, text: str, fill: str = _SOFT, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y}" fill="{fill}" text-anchor="{anchor}">{escape(text)}</text>'


def _label(row: Row) -> str:
    return row.replace("_", " ")


def _short(name: str) -> str:
    return name.partition(" (")[0]


def _seconds(ledger: Ledger) -> float:
    return (ledger.end_ns - ledger.start_ns) / 1e9


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"
