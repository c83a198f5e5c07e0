"""From stage to stage between two GPUs of one host: copies into the receiver's memory, and flags that
streams wait for.

NCCL's kernels hold multiprocessors while they wait for a peer; a copy holds none, and a flag one warp.
Each edge has a ring of slots in memory that both ranks map; a flag a slot says that it is full, another
that it is free again.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from uuid import uuid4

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import (
    PrefixStore,
    Store,
    _register_process_group,
    _SymmetricMemory,
)

from bireme.errors import EngineError
from bireme.parallel.attempts import made_by_all
from bireme.parallel.driver import has_native_atomics
from bireme.parallel.links import LateChecks, Receiver, Sender, message_head
from bireme.parallel.message_header import HEADER_BYTES, Stated
from bireme.parallel.pipeline import Edge
from bireme.request import StepHeader
from bireme.trace import SpanKind, SpanWriter

_ALIGNMENT = 512  # of a slot, bytes
_INSTEAD = "stages send over NCCL, and not through each other's memory"


@dataclass(frozen=True)
class PeerRingPlan:
    """Of an edge: messages that it holds, the largest of them (bytes), and how long a stream waits for a
    flag before it gives up."""

    edge: Edge
    depth: int
    message_bytes: int
    timeout_s: float

    @property
    def slot_bytes(self) -> int:
        return -(-(HEADER_BYTES + self.message_bytes) // _ALIGNMENT) * _ALIGNMENT


class PeerRing:
    """One side of an edge. Both ranks make it, in the same order as their other rings."""

    def __init__(
        self,
        plan: PeerRingPlan,
        group: dist.ProcessGroup,
        rank: int,
        device: torch.device,
        store: Store,
    ) -> None:
        self.plan = plan
        ends = sorted((plan.edge.src, plan.edge.dst))
        self._peer, receiver = 1 - ends.index(rank), ends.index(plan.edge.dst)
        num_bytes = plan.depth * plan.slot_bytes
        self._memory, self._handle = mapped(num_bytes, ends, group, rank, device, store)
        self._slots = self._handle.get_buffer(receiver, (plan.depth, plan.slot_bytes), torch.uint8)

    def slot(self, count: int) -> torch.Tensor:
        """[slot_bytes] of message number `count`, in the receiver's memory."""
        return self._slots[count % self.plan.depth]

    def signal_full(self, count: int) -> None:
        self._handle.put_signal(self._peer, count % self.plan.depth, self._timeout_ms)

    def await_full(self, count: int) -> None:
        self._handle.wait_signal(self._peer, count % self.plan.depth, self._timeout_ms)

    def signal_free(self, count: int) -> None:
        depth = self.plan.depth
        self._handle.put_signal(self._peer, depth + count % depth, self._timeout_ms)

    def await_free(self, count: int) -> None:
        """For message number `count`; the first of all find their slots free."""
        depth = self.plan.depth
        if count >= depth:
            self._handle.wait_signal(self._peer, depth + count % depth, self._timeout_ms)

    @property
    def _timeout_ms(self) -> int:
        return int(self.plan.timeout_s * 1000)


def mapped(
    num_bytes: int,
    ranks: Sequence[int],
    group: dist.ProcessGroup,
    rank: int,
    device: torch.device,
    store: Store,
) -> tuple[torch.Tensor, _SymmetricMemory]:
    """Memory of this rank that all `ranks` of `group`, in its order, map, uninitialised, and the handle to theirs.
    Once a group."""
    name = _agreed_name(group, is_first=rank == ranks[0], store=store)
    # what `symmetric_memory.empty` calls, after it has imported a symbolic algebra for the strides
    memory = _SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, device)
    _register_process_group(name, group)  # type: ignore[arg-type]
    _SymmetricMemory.set_group_info(
        name, list(ranks).index(rank), len(ranks), PrefixStore(name, store)
    )
    return memory, _SymmetricMemory.rendezvous(memory, name)


def _agreed_name(group: dist.ProcessGroup, *, is_first: bool, store: Store) -> str:
    """Of what a group's ranks map. torch keeps what it knows of a group by its name for as long as a process
    lives, and calls the groups of all worlds the same."""
    key = f"mapped/{group.group_name}"
    if is_first:
        store.set(key, uuid4().hex)
    return str(store.get(key).decode())


def have_peer_access(
    pairs: Sequence[tuple[int, int]], rank: int, device: torch.device, store: Store
) -> bool:
    """Whether the ranks of every pair have GPUs that can write each other's memory, with atomics: flags are raised by
    those. One GPU that they share can where torch was told to allow that. The same on all of them."""
    store.set(f"device/{rank}", str(device.index))
    places = {rank: int(store.get(f"device/{rank}")) for pair in pairs for rank in pair}
    return all(
        _reaches(*ends) for pair in pairs for ends in permutations(places[rank] for rank in pair)
    )


def _reaches(one: int, other: int) -> bool:
    if one == other:
        return os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES") == "1"
    return torch.cuda.can_device_access_peer(one, other) and has_native_atomics(one, other)


def connect(
    plans: Sequence[PeerRingPlan],
    groups: Mapping[Edge, dist.ProcessGroup],
    rank: int,
    device: torch.device,
    store: Store,
    spans: SpanWriter,
    *,
    is_beside: bool,
) -> tuple[Sender, Receiver | None] | None:
    """What a rank sends and receives through, of all edges of one kind; None where memory cannot be mapped. Ranks with
    no edge call it too, with a store of this kind's own. `is_beside`: it sends on a stream of its own."""
    mine = [plan for plan in plans if rank in (plan.edge.src, plan.edge.dst)]

    def make() -> list[PeerRing]:
        return [PeerRing(plan, groups[plan.edge], rank, device, store) for plan in mine]

    ends = sorted({end for plan in plans for end in (plan.edge.src, plan.edge.dst)} | {rank})
    rings = made_by_all(make, "rings", _INSTEAD, ends, rank, store)
    if rings is None:
        return None
    receivers = [ring for ring in rings if ring.plan.edge.dst == rank]
    senders = [ring for ring in rings if ring.plan.edge.src == rank]
    sender = PeerSenderBeside(senders, device, spans) if is_beside else PeerSender(senders, spans)
    return (
        sender,
        PeerReceiver(receivers[0], device, spans) if receivers else None,
    )


class PeerSender:
    """The sending side of a rank's edges of one kind, in the stream that makes the rows: it waits where a receiver is
    a ring behind."""

    def __init__(self, rings: Sequence[PeerRing], spans: SpanWriter) -> None:
        self._rings, self._spans, self._count = rings, spans, 0

    def send(self, header: StepHeader, rows: torch.Tensor) -> None:
        if not self._rings:
            return
        payload = _bytes_of(rows)
        with self._spans.span(SpanKind.SEND, self._num_bytes(payload)):
            self._write(header, payload, len(rows))

    def _num_bytes(self, payload: torch.Tensor) -> int:
        return (HEADER_BYTES + payload.numel()) * len(self._rings)

    def _write(self, header: StepHeader, payload: torch.Tensor, num_rows: int) -> None:
        stated = Stated.of(header, num_rows, payload.numel() // max(1, num_rows))
        head = message_head(stated, payload.device)
        for ring in self._rings:
            if payload.numel() > ring.plan.message_bytes:
                raise EngineError(
                    f"a message of {payload.numel()} bytes exceeds a slot's {ring.plan.message_bytes}"
                )
            ring.await_free(self._count)
            slot = ring.slot(self._count)
            slot[:HEADER_BYTES].copy_(head)
            slot[HEADER_BYTES : HEADER_BYTES + payload.numel()].copy_(payload)
            ring.signal_full(self._count)
        self._count += 1

    def drain(self) -> None:
        """Waits until every message lies with its receiver."""
        torch.cuda.current_stream().synchronize()


class PeerSenderBeside(PeerSender):
    """The same on a stream of its own, so that the stream that makes the rows goes on. The host waits where a receiver
    is a ring behind; until then nobody may overwrite `rows`."""

    def __init__(self, rings: Sequence[PeerRing], device: torch.device, spans: SpanWriter) -> None:
        super().__init__(rings, spans)
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._in_flight: deque[torch.cuda.Event] = deque()

    def send(self, header: StepHeader, rows: torch.Tensor) -> None:
        if not self._rings:
            return
        payload = _bytes_of(rows)
        payload.record_stream(self._stream)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with (
            torch.cuda.stream(self._stream),
            self._spans.aside(SpanKind.SEND, self._num_bytes(payload)),
        ):
            self._write(header, payload, len(rows))
            self._in_flight.append(torch.cuda.Event())
            self._in_flight[-1].record()
        while len(self._in_flight) > min(ring.plan.depth for ring in self._rings):
            with self._spans.span(SpanKind.SEND):
                self._in_flight.popleft().synchronize()

    def drain(self) -> None:
        self._stream.synchronize()


def _bytes_of(rows: torch.Tensor) -> torch.Tensor:
    return rows.contiguous().view(torch.uint8).flatten()


class PeerReceiver:
    """The receiving side of one edge."""

    def __init__(self, ring: PeerRing, device: torch.device, spans: SpanWriter) -> None:
        self._ring, self._spans, self._count = ring, spans, 0
        self._stream = torch.cuda.Stream(device)
        self._late = LateChecks(ring.plan.edge)

    def receive(
        self,
        header: StepHeader,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """Rows of `shape`; EngineError if the sender states another step or size."""
        expected = Stated.of(header, shape[0], math.prod(shape[1:]) * dtype.itemsize)
        rows = torch.empty(shape, dtype=dtype, device=device)
        end = HEADER_BYTES + expected.payload_bytes
        with self._spans.span(SpanKind.RECV, end, header[1]):
            self._ring.await_full(self._count)
            slot = self._ring.slot(self._count)
            rows.view(torch.uint8).flatten().copy_(slot[HEADER_BYTES:end])
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):  # for nothing here waits for it
            self._late.check(slot[:HEADER_BYTES], expected)
            self._ring.signal_free(self._count)
        self._count += 1
        return rows

    def finish(self) -> None:
        """Of the last messages too."""
        self._late.finish()
