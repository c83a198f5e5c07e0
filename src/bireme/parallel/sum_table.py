"""Which way of adding up rows over the GPUs of a host is quickest, measured at the start: links and GPUs differ.

Every rank adds up all rows of a few (one-shot), a share of them of more (two-shot), or leaves them to NCCL where that
is quicker.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from bireme.parallel.mesh import TensorGroup

_SIZES = (8, 64, 96, 128, 192, 256, 1024, 4096)  # rows
_NUM_SUMS, _ROUNDS = 12, 3
_AHEAD_CYCLES = 4_000_000  # about two milliseconds, in which the host tells the sums that follow
_WORTH = 0.95  # of the time of the ways before it, that another takes at most to be chosen


class Way(Enum):
    """Of summing rows over ranks."""

    ONE_SHOT = "every rank all rows"
    TWO_SHOT = "every rank a share of the rows"
    NCCL = "NCCL"


Sum = Callable[[torch.Tensor], object]  # of rows [T, D]


@dataclass(frozen=True)
class SumTable:
    """The best way for up to so many rows, the fewest first; the last holds beyond."""

    bounds: tuple[tuple[int, Way], ...]

    def way(self, num_rows: int) -> Way:
        for most, way in self.bounds:
            if num_rows <= most:
                return way
        return self.bounds[-1][1]


def quickest(ways: Sequence[Way], seconds: Sequence[float]) -> Way:
    """The first one, unless another is so much quicker that it would be found so again."""
    best = 0
    for index, taken in enumerate(seconds):
        if taken < _WORTH * seconds[best]:
            best = index
    return ways[best]


def measured_table(
    ways: Mapping[Way, Sum], rows: Mapping[Way, range], width: int, group: TensorGroup,
    device: torch.device,
) -> SumTable:  # fmt: skip
    """Of rows of `width` elements in bfloat16, each way for so many `rows`. All ranks of the group call it together,
    and get the same: times are added up over them."""
    largest = max(numbers.stop for numbers in rows.values()) - 1
    sizes = sorted({*(size for size in _SIZES if size < largest), largest})
    seconds = torch.tensor(
        [
            [
                _sum_s(run, torch.zeros(size, width, dtype=torch.bfloat16, device=device), group)
                if size in rows[way]
                else torch.inf
                for way, run in ways.items()
            ]
            for size in sizes
        ],
        device=device,
    )
    taken = group.all_reduce(seconds).tolist()
    return SumTable(
        tuple((size, quickest(list(ways), row)) for size, row in zip(sizes, taken, strict=True))
    )


def _sum_s(run: Sum, x: torch.Tensor, group: TensorGroup) -> float:
    """Of one sum among others, on the device."""
    run(x)  # compiles it
    found = []
    for _ in range(_ROUNDS):
        torch.cuda.synchronize(x.device)
        group.all_reduce(torch.zeros(1, device=x.device))
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda._sleep(_AHEAD_CYCLES)
        run(x)  # the ranks wait for one another here
        marks[0].record()
        for _ in range(_NUM_SUMS):
            run(x)
        marks[1].record()
        marks[1].synchronize()
        found.append(float(marks[0].elapsed_time(marks[1])) / 1e3 / _NUM_SUMS)
    return statistics.median(found)
