"""Tables on standard output."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

_WIDTH = 220  # of what is no terminal: tables take what they need of it


def console(*, highlight: bool = True) -> Console:
    """`highlight` colours numbers and names."""
    found = Console(highlight=highlight)
    return found if found.is_terminal else Console(width=_WIDTH, highlight=highlight)


def table(*columns: str) -> Table:
    """Of columns that hold numbers."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        made.add_column(name, justify="right", overflow="fold")
    return made
