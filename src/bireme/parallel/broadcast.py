"""A ring in shared memory: frames of any length from one writer to all its readers, on one host.

The writer waits for the slowest reader; a frame longer than the ring streams through it. Positions
are counts of bytes modulo 2^32, of which the capacity is a divisor.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from bireme.errors import EngineError
from bireme.parallel.counters import LINE_BYTES, SPIN_S, Memory

MAX_FRAME_BYTES = 1 << 30
WATCH_S = 0.1  # how often a writer that waits looks around
_LENGTH = struct.Struct("<I")
_LONG_S = 3600.0
Watch = Callable[[int], None]  # of the reader that keeps the writer waiting; raises to give up


@dataclass(frozen=True, kw_only=True)
class RingPlan:
    """One counter of what was written, one a reader of what it took, and the ring. A reader spins for `spin_s` before
    it sleeps, where each process has a core."""

    num_readers: int
    capacity: int = 1 << 21  # bytes, a power of two
    is_compiled: bool = False
    spin_s: float = SPIN_S

    @property
    def data_at(self) -> int:
        return (self.num_readers + 1) * LINE_BYTES

    @property
    def num_bytes(self) -> int:
        return self.data_at + self.capacity

    def map(self, path: str, spin_s: float = SPIN_S) -> Memory:
        num_counters = self.num_readers + 1  # as many as there are processes
        return Memory(
            path, self.num_bytes, num_counters, num_counters,
            is_compiled=self.is_compiled, spin_s=spin_s,
        )  # fmt: skip


class BroadcastWriter:
    def __init__(self, path: str, plan: RingPlan) -> None:
        memory = plan.map(path)
        self._data = memory.raw(plan.data_at, plan.capacity)
        self._written = memory.counter(0)
        self._taken = [memory.counter(1 + reader) for reader in range(plan.num_readers)]
        self._capacity, self._count = plan.capacity, 0

    def send(self, body: bytes, watch: Watch) -> None:
        """Returns once it is in the ring; `watch` is asked every WATCH_S until there is room."""
        check_length(len(body))
        frame = memoryview(_LENGTH.pack(len(body)) + body)
        size = self._capacity // 4  # readers take what there is while the rest is written
        for start in range(0, len(frame), size):
            part = frame[start : start + size]
            self._make_room(len(part), watch)
            at = self._count % self._capacity
            first = min(len(part), self._capacity - at)
            self._data[at : at + first] = part[:first]
            self._data[: len(part) - first] = part[first:]
            self._count += len(part)
            self._written.raise_to(self._count)

    def _make_room(self, num_bytes: int, watch: Watch) -> None:
        least = self._count + num_bytes - self._capacity
        for taken in self._taken:
            while not taken.await_count(least, WATCH_S):
                watch(self._slowest())

    def _slowest(self) -> int:
        behind = [(self._count - taken.value) % (1 << 32) for taken in self._taken]
        return behind.index(max(behind))


class BroadcastReader:
    def __init__(self, path: str, plan: RingPlan, reader: int) -> None:
        memory = plan.map(path, plan.spin_s)
        self._data = memory.raw(plan.data_at, plan.capacity)
        self._written, self._taken = memory.counter(0), memory.counter(1 + reader)
        self._capacity, self._count = plan.capacity, 0

    def receive(self, timeout_s: float | None = None) -> bytearray | None:
        """The next frame; None where none begins within `timeout_s`."""
        while not self._written.await_count(
            self._count + 1, _LONG_S if timeout_s is None else timeout_s
        ):
            if timeout_s is not None:
                return None
        length = bytearray(_LENGTH.size)
        self._take_into(length)
        (num_bytes,) = _LENGTH.unpack(length)
        check_length(num_bytes)
        body = bytearray(num_bytes)
        self._take_into(body)
        return body

    def _take_into(self, out: bytearray) -> None:
        view = memoryview(out)
        while view:
            if not self._written.await_count(self._count + 1, _LONG_S):
                continue
            there = (self._written.value - self._count) % (1 << 32)
            at = self._count % self._capacity
            size = min(len(view), there, self._capacity - at)
            view[:size] = self._data[at : at + size]
            view = view[size:]
            self._count += size
            self._taken.raise_to(self._count)


def check_length(num_bytes: int) -> None:
    if num_bytes > MAX_FRAME_BYTES:
        raise EngineError(f"a frame of {num_bytes} bytes exceeds the limit of {MAX_FRAME_BYTES}")
