"""How long the driver waits for a step: learned from what steps took, and longer while ranks get on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from bireme.engine.budget import MOST_GATHERED_ROWS
from bireme.request import ScheduledPiece

LEAST_S = 2.0
_TIMES_EXPECTED = 5.0
_DECAY = 0.99  # of the worst that was seen, at each further step of that size


def step_size(pieces: Sequence[ScheduledPiece], *, is_tiled: bool) -> int:
    """Of a step, to tell how long it may take by that of others: its tokens, and one for every 1,024 looked back at. In
    tiles (`engine/tiles.py`) each row has the longest context of its tile gathered: of each tile as much as that."""
    if not is_tiled:
        return sum(it.num_tokens for it in pieces) + sum(it.start for it in pieces) // 1024
    return sum(
        -(-it.num_tokens // MOST_GATHERED_ROWS) * (it.start + it.num_tokens) for it in pieces
    )


class StepCost:
    """The worst seconds of a step, by its tokens in powers of two; old ones fade."""

    def __init__(self) -> None:
        self._worst: dict[int, float] = {}

    def observe(self, num_tokens: int, seconds: float, *, is_bound: bool = False) -> None:
        """`is_bound`: it took at most so long, for nobody was looking when it ended."""
        bucket = num_tokens.bit_length()
        known = self._worst.get(bucket)
        if known is None:
            self._worst[bucket] = seconds
        elif not is_bound or seconds < known:
            self._worst[bucket] = max(seconds, _DECAY * known)

    def expected_s(self, num_tokens: int) -> float | None:
        """As the next larger size that was seen, else in proportion to the largest; None before any."""
        if not self._worst:
            return None
        bucket, largest = num_tokens.bit_length(), max(self._worst)
        if bucket > largest:
            return self._worst[largest] * (1 << (bucket - largest))
        return self._worst[min(seen for seen in self._worst if seen >= bucket)]

    def patience_s(self, batches: Iterable[int], limit_s: float) -> float:
        """For the last of these batches (tokens), the others being ahead of it."""
        expected = [self.expected_s(num_tokens) for num_tokens in batches]
        known = [seconds for seconds in expected if seconds is not None]
        if len(known) < len(expected):
            return limit_s
        return min(limit_s, max(LEAST_S, _TIMES_EXPECTED * sum(known)))


class Patience:
    """Ends when two looks, half of `patience_s` apart, find the same sign of life; at `limit_s` anyway."""

    def __init__(self, patience_s: float, limit_s: float) -> None:
        now = time.monotonic()
        self._look_s, self._limit_s, self._limit = patience_s / 2, limit_s, now + limit_s
        self._last: Hashable = None
        self.why_over = ""  # as the last look tells it
        self.next_look = min(self._limit, now + self._look_s)

    def is_over(self, sign: Hashable) -> bool:
        """A look. `sign` is never None."""
        now = time.monotonic()
        has_moved, self._last = sign != self._last, sign
        still, late = f"no further for {self._look_s:.1f} s", f"not in {self._limit_s:.0f} s"
        self.why_over = late if has_moved else still
        self.next_look = min(self._limit, now + self._look_s)
        return not has_moved or now >= self._limit


@dataclass(frozen=True, slots=True)
class _Step:
    step_id: int
    size: int
    submitted_s: float  # of the monotonic clock


class StepsInFlight:
    """Steps that were told to ranks, in their order, and how long the oldest may take: at most
    `limit_s`. `size` is of a step, to tell its cost by that of others."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._steps: deque[_Step] = deque()
        self._cost, self._last_end_s = StepCost(), 0.0
        self._oldest: Patience | None = None

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def oldest(self) -> int:
        """Its step_id."""
        return self._steps[0].step_id

    def begin(self, step_id: int, size: int) -> None:
        self._steps.append(_Step(step_id, size, time.monotonic()))

    def patience_with_all(self) -> Patience:
        return self._patience(len(self._steps))

    def patience_with_oldest(self) -> Patience:
        """The same for as long as it is the oldest, whoever waits for it, and however often."""
        if self._oldest is None:
            self._oldest = self._patience(1)
        return self._oldest

    def _patience(self, num_steps: int) -> Patience:
        sizes = [step.size for step in islice(self._steps, num_steps)]
        return Patience(self._cost.patience_s(sizes, self._limit_s), self._limit_s)

    def end(self, *, is_bound: bool) -> None:
        """Of the oldest; `is_bound` as in `StepCost.observe`."""
        step, now = self._steps.popleft(), time.monotonic()
        self._oldest = None
        begun, self._last_end_s = max(step.submitted_s, self._last_end_s), now
        self._cost.observe(step.size, now - begun, is_bound=is_bound)
