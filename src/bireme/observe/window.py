"""A part of what was recorded, that can be accounted for by itself."""

from __future__ import annotations

from bireme.chrome_trace import Recorded
from bireme.trace import SpanKind


def whole_since(recorded: Recorded, start_ns: int) -> tuple[Recorded, bool]:
    """What was recorded from then on, when nothing was in flight; or from when on all rings tell of, where
    one has been overwritten since. Whether it is all of it."""
    found = recorded.since(start_ns)
    num_told = sum(span.kind is SpanKind.SUBMIT for span in found.engine)
    num_done = [sum(it.kind is SpanKind.STEP for it in rank.spans) for rank in found.ranks]
    if all(count == num_told for count in num_done):
        return found, True
    tracks = [found.engine, *(rank.spans for rank in found.ranks)]
    known_ns = max(min((span.start_ns for span in spans), default=start_ns) for spans in tracks)
    return found.since(known_ns), False
