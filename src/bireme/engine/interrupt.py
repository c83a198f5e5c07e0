"""Ctrl-C between steps instead of in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Remembers the first Ctrl-C until `check`; the second raises wherever the program is."""

    def __init__(self) -> None:
        self._is_pending = False

    def handle(self, _signum: int, _frame: FrameType | None) -> None:
        if self._is_pending:
            raise KeyboardInterrupt
        self._is_pending = True

    def check(self) -> None:
        """Raises KeyboardInterrupt if one came since the last check."""
        if self._is_pending:
            self._is_pending = False
            raise KeyboardInterrupt


@contextmanager
def deferred_interrupts() -> Iterator[Interrupts]:
    """Within it, Ctrl-C waits for `check`. Other threads than the main one get no signals anyway."""
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = signal.signal(signal.SIGINT, interrupts.handle)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)
    interrupts.check()
