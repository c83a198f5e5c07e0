"""Ctrl-C at the end of a step instead of in the middle of one."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class _Interrupts:
    """Remembers the first Ctrl-C; the second raises wherever the program is."""

    is_pending = False

    def handle(self, _signum: int, _frame: FrameType | None) -> None:
        if self.is_pending:
            raise KeyboardInterrupt
        self.is_pending = True


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Within it, Ctrl-C waits for its end. Other threads than the main one get no signals anyway, and
    who ignores it goes on ignoring it."""
    is_ours = threading.current_thread() is threading.main_thread() and not sys.is_finalizing()
    if not is_ours or not callable(signal.getsignal(signal.SIGINT)):
        yield
        return
    interrupts = _Interrupts()
    before = signal.signal(signal.SIGINT, interrupts.handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupts.is_pending:
        raise KeyboardInterrupt
