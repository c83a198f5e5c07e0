"""Which rank the others wait for, told from outside: by its process and by its span ring.

A rank inside a collective or a transfer waits for a peer. The one that they all wait for does not:
its process is stopped, or it has not begun the step, or it is busy with something else. Where all
seem to wait, it is the one that came least far, upstream first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bireme.trace import Now, SpanKind


@dataclass(frozen=True, slots=True)
class Standing:
    """One rank as it is seen from outside."""

    stage: int
    is_stopped: bool
    now: Now

    def has_finished(self, step_id: int) -> bool:
        is_through = self.now.num_begun > 0 and self.now.kind is None
        return self.now.step_id > step_id or (self.now.step_id == step_id and is_through)

    def describe(self, step_id: int) -> str:
        """What it was last seen doing."""
        now = self.now
        stopped = "its process is stopped, " if self.is_stopped else ""
        if now.step_id < step_id or not now.num_begun:
            return f"{stopped}step {step_id} not begun"
        if now.kind is None:
            doing = "at the end of"
        else:
            doing = "in" if now.kind == SpanKind.STEP else f"in {now.kind.name.lower()} of"
        return f"{stopped}last seen {doing} step {now.step_id}"


def find_culprit(ranks: Mapping[int, Standing], step_id: int) -> int | None:
    """The rank that keeps step `step_id` from its end; None where each has done its part."""
    late = {index: rank for index, rank in ranks.items() if not rank.has_finished(step_id)}
    stopped = {index: rank for index, rank in ranks.items() if rank.is_stopped}

    def progress(index: int) -> tuple[bool, int, int, int]:
        rank = ranks[index]
        return rank.now.is_waiting, rank.now.step_id, rank.stage, rank.now.num_begun

    return min(stopped or late, key=progress, default=None)
