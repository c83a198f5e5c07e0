"""Where a dimension is cut for the ranks of a tensor group: attention heads, MLP columns, vocabulary rows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from bireme.errors import ConfigError

MLP_UNITS = (128, 64, 32, 16, 8, 1)
VOCABULARY_UNIT = 64
MAX_IMBALANCE = 0.05


@dataclass(frozen=True)
class HeadCut:
    """The attention heads of one rank: query heads [first, last), and the KV heads that they read.

    `head_map[i]` is the local KV head of local query head i.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    queries: tuple[int, int]

    @property
    def kv(self) -> tuple[int, int]:
        per_kv = self.num_heads // self.num_kv_heads
        return self.queries[0] // per_kv, -(-self.queries[1] // per_kv)

    @property
    def num_local_heads(self) -> int:
        return self.queries[1] - self.queries[0]

    @property
    def num_local_kv_heads(self) -> int:
        return self.kv[1] - self.kv[0]

    @property
    def num_shared(self) -> int | None:
        """Consecutive query heads that read each local KV head; None where they differ."""
        num = self.num_local_heads // self.num_local_kv_heads
        is_even = self.head_map == tuple(head // num for head in range(self.num_local_heads))
        return num if is_even else None

    @property
    def head_map(self) -> tuple[int, ...]:
        per_kv = self.num_heads // self.num_kv_heads
        return tuple(head // per_kv - self.kv[0] for head in range(*self.queries))


def _pack_heads(
    num_heads: int, per_kv: int, tp_size: int, max_kv: int, max_q: int
) -> list[int] | None:
    """Edges of `tp_size` runs of at most `max_q` query heads over at most `max_kv` KV heads."""
    edges = [0]
    for rank in range(tp_size):
        start = edges[-1]
        furthest = min(start + max_q, (start // per_kv + max_kv) * per_kv)
        edges.append(min(furthest, num_heads - (tp_size - rank - 1)))
    return edges if edges[-1] == num_heads else None


def head_edges(num_heads: int, num_kv_heads: int, tp_size: int) -> tuple[int, ...]:
    """Query-head edges that minimise the largest KV-head count, then the largest query-head count."""
    if tp_size > num_heads:
        raise ConfigError(
            f"tensor_parallel_size={tp_size} exceeds the {num_heads} query heads; use at most {num_heads}"
        )
    per_kv = num_heads // num_kv_heads
    for max_kv in range(1, num_kv_heads + 1):
        for max_q in range(-(-num_heads // tp_size), min(num_heads, max_kv * per_kv) + 1):
            edges = _pack_heads(num_heads, per_kv, tp_size, max_kv, max_q)
            if edges:
                return tuple(edges)
    raise AssertionError("one rank's share of all heads always fits")


def column_edges(size: int, tp_size: int) -> tuple[int, ...]:
    """Edges of `size` columns on multiples of the largest unit that keeps imbalance under 5%."""
    if tp_size > size:
        raise ConfigError(
            f"tensor_parallel_size={tp_size} exceeds the {size} MLP columns; use at most {size}"
        )
    for unit in MLP_UNITS:
        num_units = -(-size // unit)
        edges = tuple(
            min(size, unit * (num_units * rank // tp_size)) for rank in range(tp_size + 1)
        )
        widths = [stop - start for start, stop in pairwise(edges)]
        if max(widths) * tp_size / size - 1 < MAX_IMBALANCE and min(widths) > 0:
            return edges
    return edges  # unit 1: as even as whole columns can be


def vocabulary_width(vocab_size: int, tp_size: int) -> int:
    """The padded local number of vocabulary rows, the same on every rank."""
    return -(-vocab_size // (tp_size * VOCABULARY_UNIT)) * VOCABULARY_UNIT


def vocabulary_range(vocab_size: int, tp_size: int, tp_rank: int) -> tuple[int, int]:
    """The real vocabulary rows of one rank (empty on the last ranks of a small vocabulary)."""
    width = vocabulary_width(vocab_size, tp_size)
    start = min(vocab_size, tp_rank * width)
    return start, min(vocab_size, start + width)
