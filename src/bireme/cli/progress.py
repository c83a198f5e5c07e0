"""Progress bars on standard error, with a rate; silent where it is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TransferSpeedColumn,
)


class LoadProgress(Protocol):
    """Counts of a load that runs."""

    num_done: int
    num_failed: int
    num_in_flight: int
    num_pieces: int


class Advance(Protocol):
    """Takes how many bytes were done since its last call, and of how many if that is news."""

    def __call__(self, num_bytes: int, total: int | None = None, /) -> None: ...


@contextmanager
def count_bar(what: str, total: int, rate: str = "") -> Iterator[Callable[[int, int], None]]:
    """A bar of `total` things; takes how many more are done, and how many of what `rate` counts."""
    console, start, counted = Console(stderr=True), time.monotonic(), 0
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[seen]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total, seen="")

        def advance(num_done: int, num_counted: int, /) -> None:
            nonlocal counted
            counted += num_counted
            seen = f"{counted / (time.monotonic() - start):.0f} {rate}" if rate else ""
            bar.update(task, advance=num_done, seen=seen)

        yield advance


@contextmanager
def load_bar(num_requests: int, *, quiet: bool) -> Iterator[Callable[[LoadProgress], None]]:
    """A bar of requests that ended, with what is on its way; takes the counts as they are now."""
    console, start = Console(stderr=True), time.monotonic()
    columns = (
        TextColumn("requests"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[seen]}"),
    )
    is_hidden = quiet or not console.is_terminal
    with Progress(*columns, console=console, disable=is_hidden, refresh_per_second=4) as bar:
        task = bar.add_task("requests", total=num_requests, seen="")

        def show(now: LoadProgress, /) -> None:
            rate = now.num_pieces / max(time.monotonic() - start, 1e-9)
            failed = f", {now.num_failed} failed" if now.num_failed else ""
            seen = f"{now.num_in_flight} on their way{failed}, {rate:.0f} tokens/s"
            bar.update(task, completed=now.num_done, seen=seen)

        yield show


@contextmanager
def bytes_bar(what: str, total: int | None = None, *, quiet: bool) -> Iterator[Advance]:
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)

        def advance(num_bytes: int, total: int | None = None, /) -> None:
            bar.update(task, advance=num_bytes, total=total)

        yield advance
