"""Another process's clock, read on this one's: asked a few times, of which the quickest answer tells most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

_NUM_LOOKS = 5


@dataclass(frozen=True)
class Look:
    """Clocks that were read between two times of this process's."""

    start_ns: int
    end_ns: int
    clocks_ns: Sequence[int]

    @property
    def within_ns(self) -> int:
        """As far as what is read from it may be off."""
        return (self.end_ns - self.start_ns) // 2

    @property
    def behind_ns(self) -> list[int]:
        """What is to be added to each clock; 0 for one that is between the asking and the last answer, which is
        taken for the same."""
        middle_ns = (self.start_ns + self.end_ns) // 2
        return [
            0 if self.start_ns <= clock_ns <= self.end_ns else middle_ns - clock_ns
            for clock_ns in self.clocks_ns
        ]


def quickest(look: Callable[[], Look]) -> Look:
    """Of a few looks."""
    return min((look() for _ in range(_NUM_LOOKS)), key=lambda it: it.within_ns)
