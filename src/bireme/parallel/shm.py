"""Shared memory between the ranks of one host: sums, gathers and hand-over on CPU.

All ranks map one segment. Each counter in it (`counters.py`) is raised by one rank and awaited by
others. A sum is taken in rank order by every rank for itself, and so is bitwise the same on all of
them, compiled or not.
x86-64 only: plain stores become visible there in the order in which they were made.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from bireme.errors import EngineError, PeerLost
from bireme.parallel.counters import LINE_BYTES, Counter, Memory
from bireme.parallel.mesh import TensorGroup
from bireme.parallel.message_header import HEADER_BYTES, Stated
from bireme.parallel.pipeline import Edge, stage_ranks
from bireme.parallel.segment_plan import CHUNK_BYTES, Ring, SegmentPlan
from bireme.parallel.shm_helper import Group
from bireme.request import StepHeader
from bireme.trace import SpanKind, SpanWriter

_KINDS = {  # what the compiled helper sums, by its place in KINDS there
    dtype: kind
    for kind, dtype in enumerate(
        (torch.float32, torch.float64, torch.int64, torch.bfloat16, torch.float16)
    )
}


class Segment:
    """The world's memory, mapped; unmapped when nobody refers to it any more."""

    def __init__(self, path: str, plan: SegmentPlan, timeout_s: float) -> None:
        self.plan, self.timeout_s = plan, timeout_s
        self.memory = Memory(
            path, plan.num_bytes, plan.num_counters, sum(plan.widths), is_compiled=plan.is_compiled
        )
        self.bytes = torch.frombuffer(self.memory.map, dtype=torch.uint8)
        self.raw = self.memory.raw

    def counter(self, index: int, whose: int) -> RankCounter:
        return RankCounter(self.memory.counter(index), whose, self.timeout_s)


@dataclass(frozen=True, slots=True)
class RankCounter:
    """A counter that rank `whose` raises; PeerLost where it does not in time."""

    counter: Counter
    whose: int
    timeout_s: float

    def raise_to(self, count: int) -> None:
        self.counter.raise_to(count)

    def await_count(self, count: int) -> None:
        if not self.counter.await_count(count, self.timeout_s):
            raise late(self.whose, self.timeout_s)


def late(rank: int, timeout_s: float) -> PeerLost:
    return PeerLost(f"rank {rank} did not come within {timeout_s:g} s")


def join_group(segment: Segment, rank: int, spans: SpanWriter) -> ShmGroup:
    """The tensor group of `rank`."""
    made = ShmGroup if segment.memory.helper is None else CompiledGroup
    return made(segment, rank, spans)


class ShmGroup(TensorGroup):
    """Collectives of one tensor group. Two buffers a rank alternate: who waits for the next sum has
    read the one before, so the buffer of the last but one is free."""

    def __init__(self, segment: Segment, rank: int, spans: SpanWriter) -> None:
        self._segment, self._spans, self._count = segment, spans, 0
        ranks = next(ranks for ranks in stage_ranks(segment.plan.widths) if rank in ranks)
        self._ranks, self._me = ranks, rank - ranks.start
        counters = [segment.counter(other, other) for other in ranks]
        self._mine = counters.pop(self._me)
        self._others = counters

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place and in rank order; smaller types are summed in float32."""
        with self._spans.span(SpanKind.ALL_REDUCE, x.numel() * x.element_size()):
            flat = x.view(-1)
            for start, stop in self._chunks(flat):
                _sum_into(flat[start:stop], self._exchange(flat[start:stop]))
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.contiguous().view(-1)
        out = flat.new_empty(len(self._ranks), flat.numel())
        with self._spans.span(SpanKind.ALL_GATHER, out.numel() * out.element_size()):
            for start, stop in self._chunks(flat):
                for row, part in zip(out, self._exchange(flat[start:stop]), strict=True):
                    row[start:stop] = part
        return out.view(-1, *x.shape)

    @staticmethod
    def _chunks(flat: torch.Tensor) -> Iterator[tuple[int, int]]:
        size = CHUNK_BYTES // flat.element_size()
        for start in range(0, flat.numel(), size):
            yield start, min(flat.numel(), start + size)

    def _exchange(self, part: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's part, in shared memory; valid until the next but one."""
        self._count += 1
        num_bytes, plan = part.numel() * part.element_size(), self._segment.plan
        starts = [plan.buffer_at(rank, self._count & 1) for rank in self._ranks]
        parts = [self._segment.bytes[at : at + num_bytes].view(part.dtype) for at in starts]
        parts[self._me].copy_(part)
        self._mine.raise_to(self._count)
        for other in self._others:
            other.await_count(self._count)
        return parts


class CompiledGroup(ShmGroup):
    """The same in one call each: the helper's C knows the chunks and the two buffers as well."""

    def __init__(self, segment: Segment, rank: int, spans: SpanWriter) -> None:
        super().__init__(segment, rank, spans)
        memory, plan, size = segment.memory, segment.plan, len(self._ranks)
        assert memory.helper is not None
        self._sum, self._gather = memory.helper.all_reduce, memory.helper.all_gather
        counters = [memory.address + other * LINE_BYTES for other in self._ranks]
        buffers = [
            memory.address + plan.buffer_at(other, parity)
            for other in self._ranks
            for parity in (0, 1)
        ]
        self._group = Group(
            size=size,
            me=self._me,
            spin_ns=round(1e9 * memory.spin_s),
            timeout_ns=int(segment.timeout_s * 1e9),
            counters=(ctypes.c_void_p * size)(*counters),
            buffers=(ctypes.c_void_p * (2 * size))(*buffers),
        )
        self._given = ctypes.byref(self._group)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        kind = _KINDS.get(x.dtype)
        if kind is None or not x.is_contiguous():
            return super().all_reduce(x)
        num_bytes = x.nbytes
        with self._spans.span(SpanKind.ALL_REDUCE, num_bytes):
            first = self._take(num_bytes)
            self._check(self._sum(self._given, x.data_ptr(), num_bytes, kind, first))
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        out = x.new_empty(len(self._ranks), *x.shape)
        num_bytes = x.nbytes
        with self._spans.span(SpanKind.ALL_GATHER, out.nbytes):
            first = self._take(num_bytes)
            self._check(self._gather(self._given, x.data_ptr(), out.data_ptr(), num_bytes, first))
        return out

    def _take(self, num_bytes: int) -> int:
        """The count of the first of the exchanges that so many bytes need."""
        first = self._count + 1 & 0xFFFFFFFF
        self._count += -(-num_bytes // CHUNK_BYTES)
        return first

    def _check(self, late_one: int) -> None:
        if late_one >= 0:
            raise late(self._ranks[late_one], self._segment.timeout_s)


def _sum_into(out: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    if len(parts) == 2:
        torch.add(*parts, out=out)
    elif out.dtype in (torch.bfloat16, torch.float16):
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        out.copy_(total)
    else:
        torch.add(parts[0], parts[1], out=out)
        for part in parts[2:]:
            out += part


class ShmSender:
    """Writes each message into the ring of every edge of this rank."""

    def __init__(
        self, segment: Segment, edges: Sequence[tuple[Edge, Ring]], spans: SpanWriter
    ) -> None:
        self._segment, self._spans, self._count = segment, spans, 0
        self._edges = [
            (
                ring,
                segment.counter(ring.counter, edge.src),
                segment.counter(ring.counter + 1, edge.dst),
            )
            for edge, ring in edges
        ]

    def send(self, header: StepHeader, rows: torch.Tensor) -> None:
        """Waits where a receiver is `depth` messages behind; EngineError if no slot is as large."""
        if not self._edges:
            return
        payload = rows.contiguous().view(torch.uint8).view(-1)
        stated = Stated.of(header, len(rows), payload.numel() // max(1, len(rows)))
        num_bytes = HEADER_BYTES + payload.numel()
        with self._spans.span(SpanKind.SEND, num_bytes * len(self._edges)):
            for ring, written, taken in self._edges:
                if num_bytes > ring.slot_bytes:
                    raise EngineError(
                        f"a message of {num_bytes} bytes exceeds a slot's {ring.slot_bytes}"
                    )
                taken.await_count(self._count + 1 - ring.depth)
                at = ring.slot_at(self._count)
                self._segment.raw(at, HEADER_BYTES)[:] = stated.pack()
                self._segment.bytes[at + HEADER_BYTES : at + num_bytes].copy_(payload)
                written.raise_to(self._count + 1)
        self._count += 1

    def drain(self) -> None:
        """What was written stays in the segment."""


class ShmReceiver:
    """Copies messages out of the ring of one edge."""

    def __init__(self, segment: Segment, edge: Edge, ring: Ring, spans: SpanWriter) -> None:
        self._segment, self._edge, self._ring, self._spans = segment, edge, ring, spans
        self._written = segment.counter(ring.counter, edge.src)
        self._taken = segment.counter(ring.counter + 1, edge.dst)
        self._count = 0

    def receive(
        self,
        header: StepHeader,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """Rows of `shape`; EngineError if the sender states another step or size."""
        rows = torch.empty(shape, dtype=dtype, device=device)
        num_bytes = rows.numel() * rows.element_size()
        expected = Stated.of(header, shape[0], num_bytes // max(1, shape[0]))
        with self._spans.span(SpanKind.RECV, HEADER_BYTES + num_bytes, header[1]):
            self._written.await_count(self._count + 1)
            at = self._ring.slot_at(self._count)
            stated = Stated.unpack(self._segment.raw(at, HEADER_BYTES))
            if stated == expected:
                start = at + HEADER_BYTES
                payload = self._segment.bytes[start : start + num_bytes]
                rows.view(torch.uint8).view(-1).copy_(payload)
            self._count += 1
            self._taken.raise_to(self._count)
        stated.check(expected, self._edge)
        return rows

    def finish(self) -> None:
        """Each was checked when it came."""
