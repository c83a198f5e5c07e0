"""How a joined rank talks: over torch.distributed, of which this is the only caller, or over shared
memory (`shm.py`) between the CPU ranks of one host.

Every call writes a span with its bytes. Over torch.distributed each directed edge has a process
group, and so a communicator, of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from bireme.errors import PeerLost
from bireme.parallel.links import LateChecks, Receiver, Sender, message_head
from bireme.parallel.mesh import Alone, Mesh, TensorGroup
from bireme.parallel.message_header import HEADER_BYTES, Stated
from bireme.parallel.peer_group import peer_group
from bireme.parallel.peer_memory import PeerRingPlan, connect, have_peer_access
from bireme.parallel.peer_room import PeerRoom
from bireme.parallel.pipeline import Edge, forward_edges, sampled_edges, stage_ranks
from bireme.parallel.segment_plan import Ring, SegmentPlan
from bireme.parallel.shm import Segment, ShmReceiver, ShmSender, join_group
from bireme.request import StepHeader
from bireme.trace import SpanKind, SpanWriter

# how much longer a GPU waits for a peer than the driver waits for a step: who comes too late is for the driver to tell
_PATIENCE = 2


@contextmanager
def _peers() -> Iterator[None]:
    """torch reports a lost or late peer as RuntimeError; here it gets its own name."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(str(error).splitlines()[0]) from error


class DistGroup(TensorGroup):
    """Collectives of one tensor group over a process group."""

    def __init__(self, group: dist.ProcessGroup, size: int, spans: SpanWriter) -> None:
        self._group, self._size, self._spans = group, size, spans

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        with self._spans.span(SpanKind.ALL_REDUCE, x.numel() * x.element_size()), _peers():
            dist.all_reduce(x, group=self._group)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        out = x.new_empty((self._size, *x.shape))
        with self._spans.span(SpanKind.ALL_GATHER, out.numel() * x.element_size()), _peers():
            if x.is_cuda:
                dist.all_gather_into_tensor(out, x, group=self._group)
            else:
                dist.all_gather(list(out.unbind(0)), x, group=self._group)
        return out


class DistSender:
    """The sending side of a rank's edges of one kind; keeps buffers until they are delivered."""

    def __init__(
        self,
        edges: list[tuple[Edge, dist.ProcessGroup]],
        depth: int,
        device: torch.device,
        spans: SpanWriter,
    ) -> None:
        self._edges, self._depth, self._spans = edges, depth, spans
        self._stream = torch.cuda.Stream(device) if edges and device.type == "cuda" else None
        self._in_flight: deque[tuple[Callable[[], object], torch.Tensor]] = deque()  # await, of

    def send(self, header: StepHeader, rows: torch.Tensor) -> None:
        """Waits where a receiver is `depth` messages behind."""
        if not self._edges:
            return
        payload = rows.contiguous().view(torch.uint8).flatten()
        stated = Stated.of(header, len(rows), payload.numel() // max(1, len(rows)))
        message = torch.cat((message_head(stated, rows.device), payload))
        with _peers():
            if self._stream is None:
                with self._spans.span(SpanKind.SEND, message.numel() * len(self._edges)):
                    self._in_flight += [(work.wait, message) for work in self._begin(message)]
                    self._await_room()
            else:
                self._send_beside(message, self._stream)

    def _send_beside(self, message: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """On a stream of its own, so that the next step goes on meanwhile."""
        stream.wait_stream(torch.cuda.current_stream(message.device))
        message.record_stream(stream)
        num_bytes, taken = message.numel() * len(self._edges), torch.cuda.Event()
        with torch.cuda.stream(stream):
            with self._spans.aside(SpanKind.SEND, num_bytes):
                for work in self._begin(message):
                    work.wait()  # the stream does, not the host
            taken.record()
        self._in_flight += [(taken.synchronize, message)] * len(self._edges)
        if len(self._in_flight) > self._most_in_flight:
            with self._spans.span(SpanKind.SEND):
                self._await_room()

    def _begin(self, message: torch.Tensor) -> list[dist.Work]:
        return [_message(dist.isend, message, edge.dst, group) for edge, group in self._edges]

    @property
    def _most_in_flight(self) -> int:
        return self._depth * len(self._edges)

    def _await_room(self) -> None:
        while len(self._in_flight) > self._most_in_flight:
            self._in_flight.popleft()[0]()

    def drain(self) -> None:
        """Waits until every message was taken."""
        with _peers():
            while self._in_flight:
                self._in_flight.popleft()[0]()


class DistReceiver:
    """The receiving side of one edge."""

    def __init__(self, edge: Edge, group: dist.ProcessGroup, spans: SpanWriter) -> None:
        self._edge, self._group, self._spans = edge, group, spans
        self._late = LateChecks(edge)

    def receive(
        self,
        header: StepHeader,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """Rows of `shape`; EngineError if the sender states another step or size."""
        expected = Stated.of(header, shape[0], math.prod(shape[1:]) * dtype.itemsize)
        message = torch.empty(
            HEADER_BYTES + expected.payload_bytes, dtype=torch.uint8, device=device
        )
        with self._spans.span(SpanKind.RECV, message.numel(), header[1]), _peers():
            _message(dist.irecv, message, self._edge.src, self._group).wait()
        self._late.check(message[:HEADER_BYTES], expected)
        return message[HEADER_BYTES:].view(dtype).view(shape)

    def finish(self) -> None:
        """Of the last messages too."""
        self._late.finish()


def _message(
    operation: Callable[..., dist.Work | None],
    message: torch.Tensor,
    peer: int,
    group: dist.ProcessGroup,
) -> dist.Work:
    """NCCL warns of each first message that is in no batch."""
    if message.is_cuda:
        (begun,) = dist.batch_isend_irecv([dist.P2POp(operation, message, peer, group)])
        return begun
    work = operation(message, peer, group=group)
    assert work is not None
    return work


@dataclasses.dataclass
class Communicator:
    """What a joined rank talks through; `leave` gives it all back."""

    mesh: Mesh
    hidden_sender: Sender
    hidden_receiver: Receiver | None
    sampled_sender: Sender
    sampled_receiver: Receiver | None

    def leave(self) -> None:
        """Ends all groups of this process. Peers may still be there or not."""
        if dist.is_initialized():
            dist.destroy_process_group()


def join(
    widths: tuple[int, ...],
    rank: int,
    meeting: Path | Store,
    device: torch.device,
    timeout_s: float,
    spans: SpanWriter,
    segment: tuple[str, SegmentPlan] | None = None,
    room: PeerRoom = PeerRoom(),  # noqa: B008 (frozen)
) -> Communicator:
    """Joins the world of `sum(widths)` ranks, over `segment` (its path and plan) if there is one. GPUs
    that can write each other's memory do so for what there is `room` for.

    Else they meet at the file `meeting`, so that no socket listens beside gloo's own, which
    GLOO_SOCKET_IFNAME binds, or where there is none that all can open, at a store of torch's; blocks until
    all have come, PeerLost after `timeout_s`.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if segment is not None:
        return _over_shared_memory(widths, rank, Segment(*segment, timeout_s), spans)
    if sum(widths) == 1:
        return Communicator(Mesh(widths, rank, Alone()), _nobody(spans), None, _nobody(spans), None)
    with _peers():
        return _over_distributed(widths, rank, meeting, device, timeout_s, spans, room)


def _nobody(spans: SpanWriter) -> Sender:
    return DistSender([], 1, torch.device("cpu"), spans)


def _over_shared_memory(
    widths: tuple[int, ...], rank: int, segment: Segment, spans: SpanWriter
) -> Communicator:
    mesh = Mesh(widths, rank)
    rings = list(segment.plan.rings())
    num_forward = len(forward_edges(widths))

    def sender(kind: list[tuple[Edge, Ring]]) -> Sender:
        return ShmSender(segment, [(edge, ring) for edge, ring in kind if edge.src == rank], spans)

    def receiver(kind: list[tuple[Edge, Ring]]) -> Receiver | None:
        mine = [ShmReceiver(segment, *pair, spans) for pair in kind if pair[0].dst == rank]
        return mine[0] if mine else None

    hidden, sampled = rings[:num_forward], rings[num_forward:]
    group = join_group(segment, rank, spans) if mesh.tp_size > 1 else Alone()
    return Communicator(
        Mesh(widths, rank, group),
        sender(hidden),
        receiver(hidden),
        sender(sampled),
        receiver(sampled),
    )


def _over_distributed(
    widths: tuple[int, ...],
    rank: int,
    meeting: Path | Store,
    device: torch.device,
    timeout_s: float,
    spans: SpanWriter,
    room: PeerRoom,
) -> Communicator:
    world, timeout = sum(widths), timedelta(seconds=timeout_s)
    store = meeting
    if isinstance(store, Path):
        store = dist.FileStore(str(store), world)  # type: ignore[attr-defined]
        store.set_timeout(_PATIENCE * timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    tensor: TensorGroup | None = None
    for ranks in stage_ranks(widths):
        group = _group(ranks, timeout)
        if rank in ranks and len(ranks) > 1:
            tensor, own = DistGroup(group, len(ranks), spans), (group, ranks)
    forward = {edge: _group((edge.src, edge.dst), timeout) for edge in forward_edges(widths)}
    sampled = {edge: _group((edge.src, edge.dst), timeout) for edge in sampled_edges(widths)}
    _connect(rank, {**forward, **sampled}, device)
    if tensor is not None:
        tensor.all_reduce(torch.zeros(1, device=device))
        tensor = peer_group(
            tensor,
            *own,
            rank,
            room.row_bytes,
            room.sum_bytes,
            device,
            store,
            _PATIENCE * timeout_s,
            spans,
        )

    def sender(groups: dict[Edge, dist.ProcessGroup]) -> Sender:
        mine = [(edge, group) for edge, group in groups.items() if edge.src == rank]
        return DistSender(mine, len(widths) + 1, device, spans)

    def receiver(groups: dict[Edge, dist.ProcessGroup]) -> Receiver | None:
        mine = [
            DistReceiver(edge, group, spans) for edge, group in groups.items() if edge.dst == rank
        ]
        return mine[0] if mine else None

    mesh = Mesh(widths, rank, tensor or Alone())
    found = Communicator(
        mesh, sender(forward), receiver(forward), sender(sampled), receiver(sampled)
    )
    kinds = ((forward, room.hidden_bytes), (sampled, room.sampled_bytes))
    pairs = [(edge.src, edge.dst) for kind, num_bytes in kinds if num_bytes for edge in kind]
    if not pairs or not have_peer_access(pairs, rank, device, store):
        return found

    def through_peers(
        kind: str, groups: dict[Edge, dist.ProcessGroup], num_bytes: int
    ) -> tuple[Sender, Receiver | None] | None:
        if not num_bytes:
            return None
        plans = [
            PeerRingPlan(edge, len(widths) + 1, num_bytes, _PATIENCE * timeout_s) for edge in groups
        ]
        own = PrefixStore(kind, store)
        return connect(plans, groups, rank, device, own, spans, is_beside=room.sends_beside)

    if ends := through_peers("hidden", forward, room.hidden_bytes):
        found.hidden_sender, found.hidden_receiver = ends
    if ends := through_peers("sampled", sampled, room.sampled_bytes):
        found.sampled_sender, found.sampled_receiver = ends
    return found


def _connect(rank: int, edges: dict[Edge, dist.ProcessGroup], device: torch.device) -> None:
    """One byte over every edge, in one order everywhere: NCCL connects at the first message, and its
    sender would wait for a receiver that is not there yet."""
    for edge, group in edges.items():
        byte = torch.zeros(1, dtype=torch.uint8, device=device)
        if rank == edge.src:
            _message(dist.isend, byte, edge.dst, group).wait()
        elif rank == edge.dst:
            _message(dist.irecv, byte, edge.src, group).wait()


def _group(ranks: Iterable[int], timeout: timedelta) -> dist.ProcessGroup:
    """Every rank makes every group, in the same order: torch names groups by their count."""
    group: dist.ProcessGroup = dist.new_group(sorted(ranks), timeout=timeout)
    return group
