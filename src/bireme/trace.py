"""Span records: what a rank did when, in a fixed-size ring of shared memory.

Each rank writes its own ring (one writer, no lock); the parent holds the same pages, so that the
spans are readable after the rank's death, kill -9 included. The ring keeps the newest `capacity`
records; its header says what the rank is in the middle of, and what all spans so far add up to.
Times are CLOCK_MONOTONIC nanoseconds, the same clock for all processes of a host. Where the parent found
a rank's clock to be another, `set_clock` says how far it is behind, and times are read on the parent's.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain
from typing import Protocol

import msgspec

_HEADER = struct.Struct("<8sIIQ")  # magic, record size, capacity, records ever written
_NOW = struct.Struct("<III4x")  # step id, spans begun in it, innermost open kind (0: none)
_RECORD = struct.Struct("<QQQIHH")  # start ns, end ns, bytes, step id, kind, incarnation
_pack_now, _pack_record = _NOW.pack_into, _RECORD.pack_into
_MAGIC = b"BIREME06"
_COUNT_AT = struct.calcsize("<8sII")
DEFAULT_CAPACITY = 1 << 16


class SpanKind(IntEnum):
    """What a span measures; nested kinds lie inside a STEP. The last four are the driver's: a step is
    told to the ranks, the oldest is waited for, there is no request, it is at work between those."""

    STEP = 1
    COMPUTE = 2
    ALL_REDUCE = 3
    ALL_GATHER = 4
    SEND = 5
    RECV = 6
    SAMPLE = 7
    LOAD = 8
    SUBMIT = 9
    WAIT = 10
    EMPTY = 11
    WORK = 12


COLLECTIVES = (SpanKind.ALL_REDUCE, SpanKind.ALL_GATHER)


_NUM_KINDS = max(SpanKind) + 1  # 0: what is around the outermost span
_KINDS = dict(
    enumerate(SpanKind, 1)
)  # to look one up takes a tenth of what a call of the class does
_TOTALS = struct.Struct(f"<{4 * _NUM_KINDS}Q")  # by kind: spans, ns, ns of spans inside, bytes
_TOTALS_AT = _HEADER.size + _NOW.size
_CLOCK = struct.Struct("<q")  # ns to add to every time
_CLOCK_AT = _TOTALS_AT + _TOTALS.size
_RECORDS_AT = _CLOCK_AT + _CLOCK.size
_NUM_WORDS = _RECORD.size // 8

_CATEGORY = {
    **dict.fromkeys(COLLECTIVES, "collective"),
    SpanKind.SEND: "transfer",
    SpanKind.RECV: "transfer",
}


class Span(msgspec.Struct, frozen=True, gc=False):
    """One record, read back: [start_ns, end_ns) of the monotonic clock. A `Struct`, for there are many: a
    frozen dataclass takes six times as long to make."""

    kind: SpanKind
    start_ns: int
    end_ns: int
    num_bytes: int
    step_id: int
    incarnation: int

    @property
    def category(self) -> str:
        return _CATEGORY.get(self.kind, "compute")

    @classmethod
    def empty_since(cls, told: Sequence[Span]) -> Span:
        """Of a driver that has had no request since its last span, up to now."""
        start_ns = max((span.end_ns for span in told), default=0)
        return cls(SpanKind.EMPTY, start_ns, time.monotonic_ns(), 0, 0, 0)


@dataclass(frozen=True)
class RankSpans:
    """What one rank wrote, and which it is."""

    name: str
    stage: int
    tp_rank: int
    spans: Sequence[Span]


@dataclass(frozen=True, slots=True)
class Now:
    """What a rank is in the middle of: its step, the spans begun in it, and the innermost open one."""

    step_id: int
    num_begun: int
    kind: SpanKind | None

    @property
    def is_waiting(self) -> bool:
        """True inside a collective or a transfer, which ends when a peer comes."""
        return self.kind is not None and _CATEGORY.get(self.kind) in ("collective", "transfer")


@dataclass(frozen=True, slots=True)
class Total:
    """What all spans of a kind add up to; `inner_ns` of `ns` were in spans inside them."""

    num_spans: int = 0
    ns: int = 0
    inner_ns: int = 0
    num_bytes: int = 0

    @property
    def own_ns(self) -> int:
        """Less what the spans inside account for."""
        return self.ns - self.inner_ns

    def __sub__(self, before: Total) -> Total:
        return Total(
            self.num_spans - before.num_spans,
            self.ns - before.ns,
            self.inner_ns - before.inner_ns,
            self.num_bytes - before.num_bytes,
        )


Totals = Mapping[SpanKind, Total]


class SpanWriter(Protocol):
    """What a rank tells of its time to; on CUDA `kernels.device_spans` stands before the ring."""

    def set_step(self, step_id: int, incarnation: int) -> None:
        """The step that the following records belong to."""
        ...

    def span(
        self, kind: SpanKind, num_bytes: int = 0, step_id: int | None = None
    ) -> AbstractContextManager[None]:
        """What is done inside it becomes a record; `step_id` where it is of another step than this."""
        ...

    def aside(self, kind: SpanKind, num_bytes: int) -> AbstractContextManager[None]:
        """The same for what the step does not wait for, where a device can do both at once."""
        ...


class OpenSpan:
    """A span that is being measured. A class of its own: a generator costs a sum a tenth of its time."""

    __slots__ = ("_kind", "_num_bytes", "_outer", "_ring", "_start_ns", "_step_id")

    def __init__(self, ring: SpanRing, kind: SpanKind, num_bytes: int, step_id: int) -> None:
        self._ring, self._kind, self._num_bytes, self._step_id = ring, kind, num_bytes, step_id

    def __enter__(self) -> None:
        self._outer = self._ring.begin(self._kind)
        self._start_ns = time.monotonic_ns()

    def __exit__(self, *_: object) -> None:
        self._ring.close_span(
            self._kind,
            self._outer,
            self._start_ns,
            time.monotonic_ns(),
            self._num_bytes,
            self._step_id,
        )


class SpanRing:
    """A ring of span records in shared memory, known by its file descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, 0)
        self._written = memoryview(self._map)[_COUNT_AT : _COUNT_AT + 8].cast("Q")
        self._words = memoryview(self._map)[_RECORDS_AT:].cast("Q")
        magic, size, self.capacity, self._count = _HEADER.unpack_from(self._map, 0)
        if magic != _MAGIC or size != _RECORD.size:
            raise ValueError(f"descriptor {fd} holds no span ring of this version")
        self._step_id = 0
        self._incarnation = 0
        self._num_begun = 0
        self._open = 0
        self._totals = [[0, 0, 0, 0] for _ in range(_NUM_KINDS)]

    @classmethod
    def create(cls, capacity: int = DEFAULT_CAPACITY) -> SpanRing:
        """A new ring in anonymous shared memory; pass `fd` to the rank that writes it."""
        fd = os.memfd_create("bireme-spans", os.MFD_CLOEXEC)
        os.ftruncate(fd, _RECORDS_AT + capacity * _RECORD.size)
        os.pwrite(fd, _HEADER.pack(_MAGIC, _RECORD.size, capacity, 0), 0)
        return cls(fd)

    def close_fd(self) -> None:
        """The ring stays mapped until nobody refers to it."""
        os.close(self.fd)

    def close(self) -> None:
        self._written.release()
        self._words.release()
        self._map.close()
        self.close_fd()

    def set_clock(self, behind_ns: int) -> None:
        """How far the writer's clock is behind the reader's."""
        _CLOCK.pack_into(self._map, _CLOCK_AT, behind_ns)

    def set_step(self, step_id: int, incarnation: int) -> None:
        self._step_id, self._incarnation = step_id, incarnation & 0xFFFF
        self._num_begun = self._open = 0
        _pack_now(self._map, _HEADER.size, step_id, 0, 0)

    def write(self, kind: SpanKind, start_ns: int, end_ns: int, num_bytes: int = 0) -> None:
        """A span inside the innermost open one, measured by the caller."""
        self.close_span(kind, self._open, start_ns, end_ns, num_bytes, self._step_id)

    def close_span(
        self, kind: int, outer: int, start_ns: int, end_ns: int, num_bytes: int, step_id: int
    ) -> None:
        """Writes its record; `outer` is the kind of the span around it, 0 where there is none."""
        self.record(kind, outer, start_ns, end_ns, num_bytes, step_id, self._incarnation)
        self.end(outer)

    def record(
        self,
        kind: int,
        outer: int,
        start_ns: int,
        end_ns: int,
        num_bytes: int,
        step_id: int,
        incarnation: int,
        weight: int = 1,
    ) -> None:
        """A span that may be over for a while; `weight` where its time stands for that of so many. One
        call with everything in it: a call more costs as much as three of its sums."""
        at = _RECORDS_AT + self._count % self.capacity * _RECORD.size
        _pack_record(self._map, at, start_ns, end_ns, num_bytes, step_id, kind, incarnation)
        self._count += 1
        self._written[0] = self._count  # one store, after the record: no torn reads
        num_ns = (end_ns - start_ns) * weight
        total = self._totals[kind]
        total[0] += 1
        total[1] += num_ns
        total[3] += num_bytes
        self._totals[outer][2] += num_ns
        if not outer:
            self._publish_totals()

    def count(self, kind: int, num_bytes: int) -> None:
        """A span for whose time another stands."""
        total = self._totals[kind]
        total[0] += 1
        total[3] += num_bytes

    def _publish_totals(self) -> None:
        """A step at a time: a store a span would cost more than the sums do."""
        _TOTALS.pack_into(self._map, _TOTALS_AT, *chain.from_iterable(self._totals))

    def span(self, kind: SpanKind, num_bytes: int = 0, step_id: int | None = None) -> OpenSpan:
        return OpenSpan(self, kind, num_bytes, self._step_id if step_id is None else step_id)

    aside = span

    @property
    def step(self) -> tuple[int, int]:
        """That of the following records, and its incarnation."""
        return self._step_id, self._incarnation

    def begin(self, kind: int) -> int:
        """Opens a span; the kind of the one around it."""
        outer, self._open = self._open, kind
        self._num_begun += 1
        _pack_now(self._map, _HEADER.size, self._step_id, self._num_begun, kind)
        return outer

    def end(self, outer: int) -> None:
        """Back in the span around the one that ends, of kind `outer`."""
        self._open = outer
        _pack_now(self._map, _HEADER.size, self._step_id, self._num_begun, outer)

    def now(self) -> Now:
        """What the writer was in the middle of when it last began or ended a span."""
        step_id, num_begun, kind = _NOW.unpack_from(self._map, _HEADER.size)
        return Now(step_id, num_begun, SpanKind(kind) if kind else None)

    def totals(self) -> dict[SpanKind, Total]:
        """Of all spans since the ring was made, up to the end of the newest outermost one.

        Read while the writer stores it, some kinds may be a step ahead of others; each number is whole.
        """
        found = _TOTALS.unpack_from(self._map, _TOTALS_AT)
        return {kind: Total(*found[4 * kind : 4 * kind + 4]) for kind in SpanKind}

    def read(self, since_ns: int = 0) -> list[Span]:
        """The newest records, oldest first: those that ended after `since_ns`, and the one before them.
        The record under the writer's hand is left out, and those that it came over meanwhile."""
        count, (behind_ns,) = self._written[0], _CLOCK.unpack_from(self._map, _CLOCK_AT)
        first = max(0, count - self.capacity + 1) if count >= self.capacity else 0
        start = count
        while start > first:
            start -= 1
            if self._words[start % self.capacity * _NUM_WORDS + 1] + behind_ns < since_ns:
                break
        records = self._records(start, count)
        oldest = max(0, self._written[0] - self.capacity + 1)
        whole = records[max(0, oldest - start) :]  # the others may be of two records, or of none
        return [
            Span(_KINDS[kind], begin + behind_ns, end + behind_ns, num_bytes, step, incarnation)
            for begin, end, num_bytes, step, kind, incarnation in whole
        ]

    def last_end_ns(self, kind: SpanKind) -> int | None:
        """When the newest span of a kind ended; None where the ring holds none."""
        count, (behind_ns,) = self._written[0], _CLOCK.unpack_from(self._map, _CLOCK_AT)
        for index in range(count - 1, max(-1, count - self.capacity), -1):
            at = _RECORDS_AT + index % self.capacity * _RECORD.size
            _, end_ns, _, _, found, _ = _RECORD.unpack_from(self._map, at)
            if found == kind:
                return int(end_ns + behind_ns)
        return None

    def _records(self, start: int, stop: int) -> list[tuple[int, ...]]:
        """[start, stop) of those ever written; copied at once, in two parts where the ring begins anew."""
        if start == stop:
            return []
        at, end = start % self.capacity, (stop - 1) % self.capacity + 1
        parts = [(at, end)] if at < end else [(at, self.capacity), (0, end)]
        size = _RECORD.size
        copy = b"".join(
            self._map[_RECORDS_AT + one * size : _RECORDS_AT + other * size] for one, other in parts
        )
        return list(_RECORD.iter_unpack(copy))

    @property
    def path(self) -> str:
        """Under which other processes of this user can open it, while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"
