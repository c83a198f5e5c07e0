"""Progress bars on standard error, with a rate; silent where it is no terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn


class Advance(Protocol):
    """Takes how many bytes were done since its last call, and of how many if that is news."""

    def __call__(self, num_bytes: int, total: int | None = None, /) -> None: ...


@contextmanager
def bytes_bar(what: str, total: int | None = None, *, quiet: bool) -> Iterator[Advance]:
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)

        def advance(num_bytes: int, total: int | None = None, /) -> None:
            bar.update(task, advance=num_bytes, total=total)

        yield advance
