"""Which points are measured, and how much time each may take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

_KIB, _MIB = 1 << 10, 1 << 20


@dataclass(frozen=True, kw_only=True)
class ProbePlan:
    """Sizes in bytes, rising. `budget_s`: of the repeats of one point; of what goes on between
    ranks, of one point over all groups or pairs together."""

    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    weights: tuple[tuple[int, int], ...]  # (in_features, out_features)
    num_tokens: tuple[int, ...]
    memory_bytes: int
    file_bytes: int
    message_bytes: tuple[int, ...]
    budget_s: float
    pairs_are_alike: bool  # one stands for all
    is_quick: bool = False

    def num_points(self, num_ranks: int) -> int:
        local = len(self.dtypes) * len(self.weights) * len(self.num_tokens) + 4
        between = len(self.groups(num_ranks)) + len(self.pairs(num_ranks))
        return local + num_ranks + between * len(self.message_bytes)

    def pairs(self, num_ranks: int) -> list[tuple[int, ...]]:
        """Whose messages are measured."""
        every: list[tuple[int, ...]] = [*combinations(range(num_ranks), 2)]
        return every[:1] if self.pairs_are_alike else every

    def groups(self, num_ranks: int) -> list[tuple[int, ...]]:
        """Whose sums are measured: these pairs, and the first ranks of every number beyond."""
        wider = (tuple(range(size)) for size in range(3, num_ranks + 1))
        return [*self.pairs(num_ranks), *wider]


def _powers(first: int, last: int, factor: int) -> tuple[int, ...]:
    sizes = [first]
    while sizes[-1] < last:
        sizes.append(sizes[-1] * factor)
    return tuple(sizes)


QUICK = ProbePlan(
    weights=((512, 512),),
    num_tokens=(1, 16, 256),
    memory_bytes=16 * _MIB,
    file_bytes=8 * _MIB,
    message_bytes=_powers(4 * _KIB, _MIB, 16),
    budget_s=0.02,
    pairs_are_alike=True,
    is_quick=True,
)
FULL_ON_CPU = ProbePlan(
    weights=((1024, 1024), (4096, 4096)),
    num_tokens=_powers(1, 2048, 2),
    memory_bytes=256 * _MIB,
    file_bytes=256 * _MIB,
    message_bytes=_powers(_KIB, 64 * _MIB, 4),
    budget_s=0.5,
    pairs_are_alike=True,
)
FULL_ON_CUDA = ProbePlan(
    weights=((1024, 1024), (4096, 4096), (8192, 8192)),
    num_tokens=_powers(1, 8192, 2),
    memory_bytes=1024 * _MIB,
    file_bytes=1024 * _MIB,
    message_bytes=_powers(_KIB, 256 * _MIB, 4),
    budget_s=0.3,
    pairs_are_alike=False,
)


def plan_for(kind: str, *, is_quick: bool) -> ProbePlan:
    full = FULL_ON_CUDA if kind == "cuda" else FULL_ON_CPU
    return replace(QUICK, pairs_are_alike=full.pairs_are_alike) if is_quick else full
