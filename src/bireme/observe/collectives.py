"""What collectives took, by the bytes of their tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean, median

import msgspec

from bireme.chrome_trace import Recorded
from bireme.observe.timeline import Key, rank_steps


class CollectiveSize(msgspec.Struct, frozen=True):
    """All collectives of one kind and size, over all ranks. Seconds: `wait_s` until the last rank of the
    group had come, `move_s` from then on (of one, the median), `skew_s` from the first to the last to come
    (of one, the mean)."""

    kind: str
    num_bytes: int
    count: int
    wait_s: float
    move_s: float
    median_move_s: float
    skew_s: float
    last: dict[str, int]  # how often each rank was the last to come

    @property
    def bytes_per_s(self) -> float:
        """Of the tensor, in the median."""
        return self.num_bytes / self.median_move_s if self.median_move_s else 0.0


@dataclass
class _One:
    """One collective, as its ranks saw it: (start, end, rank) each, in nanoseconds."""

    seen: list[tuple[int, int, str]] = field(default_factory=list)


def collectives_by_size(recorded: Recorded) -> list[CollectiveSize]:
    """The one that took most in all first."""
    found: dict[tuple[str, int], dict[tuple[int, Key, int], _One]] = defaultdict(dict)
    for rank in recorded.ranks:
        for step in rank_steps(rank.spans):
            for ordinal, span in enumerate(step.collectives):
                ones = found[span.kind.name.lower(), span.num_bytes]
                one = ones.setdefault((rank.stage, step.key, ordinal), _One())
                one.seen.append((span.start_ns, span.end_ns, rank.name))
    sizes = [_size(kind, size, list(ones.values())) for (kind, size), ones in found.items()]
    return sorted(sizes, key=lambda size: -(size.wait_s + size.move_s))


def _size(kind: str, num_bytes: int, ones: Sequence[_One]) -> CollectiveSize:
    waits, moves, skews = [], [], []
    last: dict[str, int] = defaultdict(int)
    for one in ones:
        come_ns, _, name = max(one.seen)
        skews.append(come_ns - min(one.seen)[0])
        last[name] += 1
        for start, end, _ in one.seen:
            waits.append(min(come_ns, end) - start)
            moves.append(max(end - come_ns, 0))
    return CollectiveSize(
        kind=kind,
        num_bytes=num_bytes,
        count=len(ones),
        wait_s=sum(waits) / 1e9,
        move_s=sum(moves) / 1e9,
        median_move_s=median(moves) / 1e9,
        skew_s=mean(skews) / 1e9,
        last=dict(last),
    )
