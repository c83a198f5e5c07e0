"""What an engine's thread tells of its own time: it tells the ranks of a step, waits for one, has no request,
or is at work between those."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from bireme.request import StepHeader
from bireme.trace import SpanKind, SpanRing


class DriverSpans:
    """Of one thread. Every span but WORK is written by who does it; a WORK span is written when the next other
    begins, so that a time of which nothing is known stays one."""

    def __init__(self, ring: SpanRing) -> None:
        self._ring = ring
        self._free_ns = time.monotonic_ns()  # since when it has been at work

    @contextmanager
    def span(self, kind: SpanKind, header: StepHeader | None = None) -> Iterator[None]:
        """`header` of the step that is told. One span ends where the next begins, whatever comes between them."""
        self.was_at_work()
        if header is not None:
            incarnation, step_id = header
            self._ring.set_step(step_id, incarnation)
        outer, start_ns = self._ring.begin(kind), self._free_ns
        try:
            yield
        finally:
            self._free_ns = time.monotonic_ns()
            step_id, _ = self._ring.step
            self._ring.close_span(kind, outer, start_ns, self._free_ns, 0, step_id)

    def was_at_work(self) -> None:
        """From when the last span ended until now."""
        self._was(SpanKind.WORK)

    def was_empty(self) -> None:
        """There was no request from when the last span ended until now."""
        self._was(SpanKind.EMPTY)

    def _was(self, kind: SpanKind) -> None:
        now_ns = time.monotonic_ns()
        self._ring.write(kind, self._free_ns, now_ns)
        self._free_ns = now_ns
