"""What lies where in the memory that the CPU ranks of one host share."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass

from bireme.parallel.counters import LINE_BYTES, create_memory
from bireme.parallel.message_header import HEADER_BYTES
from bireme.parallel.pipeline import Edge, forward_edges, sampled_edges

CHUNK_BYTES = 1 << 20  # of a sum at a time: what stays in a core's cache


def is_supported() -> bool:
    return platform.system() == "Linux" and platform.machine() == "x86_64"


def _up(num_bytes: int) -> int:
    return -(-num_bytes // LINE_BYTES) * LINE_BYTES


@dataclass(frozen=True, kw_only=True)
class SegmentPlan:
    """What lies where in the segment of a world: counters, buffers of sums, rings of messages.

    Each edge has a ring of `depth` messages of at most `hidden_bytes` or `sampled_bytes`. Memory
    is taken by pages as they are first written. `is_compiled`: all ranks use the compiled helper.
    """

    widths: tuple[int, ...]
    hidden_bytes: int
    sampled_bytes: int
    is_compiled: bool = False

    @property
    def depth(self) -> int:
        return len(self.widths) + 1

    @property
    def _edges(self) -> list[tuple[Edge, int]]:
        """Every edge with the bytes of a message's slot; two ranks can have one of each kind."""
        hidden = [(edge, self.hidden_bytes) for edge in forward_edges(self.widths)]
        sampled = [(edge, self.sampled_bytes) for edge in sampled_edges(self.widths)]
        return [(edge, _up(HEADER_BYTES + size)) for edge, size in (*hidden, *sampled)]

    @property
    def num_counters(self) -> int:
        return sum(self.widths) + 2 * len(self._edges)

    def buffer_at(self, rank: int, parity: int) -> int:
        return _up(self.num_counters * LINE_BYTES) + (2 * rank + parity) * CHUNK_BYTES

    def rings(self) -> Iterator[tuple[Edge, Ring]]:
        """Forward edges, then those of sampled ids."""
        at, counter = self.buffer_at(sum(self.widths), 0), sum(self.widths)
        for edge, slot_bytes in self._edges:
            yield edge, Ring(counter, at, slot_bytes, self.depth)
            at, counter = at + slot_bytes * self.depth, counter + 2

    @property
    def num_bytes(self) -> int:
        rings = sum(slot_bytes * self.depth for _, slot_bytes in self._edges)
        return self.buffer_at(sum(self.widths), 0) + rings


@dataclass(frozen=True)
class Ring:
    """Where an edge's messages lie; its counters are those written and, next to it, those taken."""

    counter: int
    start: int
    slot_bytes: int
    depth: int

    def slot_at(self, count: int) -> int:
        return self.start + count % self.depth * self.slot_bytes


def create_segment(plan: SegmentPlan) -> tuple[int, str]:
    """Its descriptor, and the path that ranks open it by."""
    return create_memory(plan.num_bytes, "bireme-world")
