"""Commands for an engine, from any thread to the one that runs it."""

from __future__ import annotations

import os
import queue
import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import Generic, TypeVar

C = TypeVar("C")


class Inbox(Generic[C]):
    """`wake` is readable while commands may be there."""

    def __init__(self) -> None:
        self._commands: queue.SimpleQueue[C] = queue.SimpleQueue()
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        weakref.finalize(self, _close, self._reader, self._writer)

    @property
    def wake(self) -> int:
        return self._reader

    def put(self, command: C) -> None:
        self._commands.put(command)
        with suppress(BlockingIOError):  # full: it is readable already
            os.write(self._writer, b"\0")

    def take(self) -> Iterator[C]:
        """All that are there."""
        with suppress(BlockingIOError):
            os.read(self._reader, 1 << 16)
        try:
            while True:
                yield self._commands.get_nowait()
        except queue.Empty:
            return


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)
