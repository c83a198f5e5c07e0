"""The only caller of torch.distributed: joins groups, reduces, gathers, and hands over.

Every call writes a span with its bytes. Hidden states and sampled ids travel with a header that
states step and size; a receiver that expected something else raises, since gloo accepts a short
message silently. Each directed edge has a process group, and so a communicator, of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from bireme.errors import EngineError, PeerLost
from bireme.parallel.mesh import Alone, Mesh
from bireme.parallel.pipeline import Edge, forward_edges, sampled_edges, stage_ranks
from bireme.trace import SpanKind, SpanRing

_HEADER_BYTES = 32  # step_id, number of rows, row bytes, incarnation: four int64


@contextmanager
def _peers() -> Iterator[None]:
    """torch reports a lost or late peer as RuntimeError; here it gets its own name."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(str(error).splitlines()[0]) from error


class JoinedGroup:
    """Collectives of one tensor group over a process group."""

    def __init__(self, group: dist.ProcessGroup, size: int, spans: SpanRing) -> None:
        self._group, self._size, self._spans = group, size, spans

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        with self._spans.span(SpanKind.ALL_REDUCE, x.numel() * x.element_size()), _peers():
            dist.all_reduce(x, group=self._group)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        out = x.new_empty((self._size, *x.shape))
        with self._spans.span(SpanKind.ALL_GATHER, out.numel() * x.element_size()), _peers():
            dist.all_gather(list(out.unbind(0)), x, group=self._group)
        return out


class Sender:
    """The sending side of a rank's edges of one kind; keeps buffers until they are delivered."""

    def __init__(
        self, edges: list[tuple[Edge, dist.ProcessGroup]], depth: int, spans: SpanRing
    ) -> None:
        self._edges, self._depth, self._spans = edges, depth, spans
        self._in_flight: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def send(self, header: tuple[int, int], rows: torch.Tensor) -> None:
        """Sends rows [T, ...] of the step (incarnation, step_id) to every receiver of this rank."""
        if not self._edges:
            return
        incarnation, step_id = header
        rows = rows.contiguous()
        payload = rows.view(torch.uint8).flatten()
        message = torch.empty(
            _HEADER_BYTES + payload.numel(), dtype=torch.uint8, device=rows.device
        )
        stated = (step_id, rows.shape[0], payload.numel() // max(1, rows.shape[0]), incarnation)
        message[:_HEADER_BYTES].view(torch.int64).copy_(torch.tensor(stated))
        message[_HEADER_BYTES:] = payload
        with self._spans.span(SpanKind.SEND, message.numel() * len(self._edges)), _peers():
            for edge, group in self._edges:
                work = dist.isend(message, edge.dst, group=group)
                assert work is not None
                self._in_flight.append((work, message))
            while len(self._in_flight) > self._depth * len(self._edges):
                self._in_flight.popleft()[0].wait()

    def drain(self) -> None:
        """Waits until every message was taken."""
        with _peers():
            while self._in_flight:
                self._in_flight.popleft()[0].wait()


class Receiver:
    """The receiving side of one edge. On CUDA the stated size is checked a step later, without a
    host synchronisation."""

    def __init__(self, edge: Edge, group: dist.ProcessGroup, spans: SpanRing) -> None:
        self._edge, self._group, self._spans = edge, group, spans
        self._unchecked: deque[tuple[torch.cuda.Event, torch.Tensor, tuple[int, ...]]] = deque()

    def receive(
        self,
        header: tuple[int, int],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """Rows of `shape`; EngineError if the sender states another step or size."""
        incarnation, step_id = header
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        message = torch.empty(
            _HEADER_BYTES + shape[0] * row_bytes, dtype=torch.uint8, device=device
        )
        with self._spans.span(SpanKind.RECV, message.numel()), _peers():
            work = dist.irecv(message, self._edge.src, group=self._group)
            assert work is not None
            work.wait()
        self._check(message, (step_id, shape[0], row_bytes, incarnation))
        return message[_HEADER_BYTES:].view(dtype).view(shape)

    def _check(self, message: torch.Tensor, expected: tuple[int, ...]) -> None:
        stated = message[:_HEADER_BYTES].view(torch.int64)
        if not message.is_cuda:
            return self._compare(stated, expected)
        pinned = torch.empty(4, dtype=torch.int64, pin_memory=True)
        pinned.copy_(stated, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._unchecked.append((event, pinned, expected))
        while self._unchecked and self._unchecked[0][0].query():
            _, stated, expected = self._unchecked.popleft()
            self._compare(stated, expected)
        return None

    def _compare(self, stated: torch.Tensor, expected: tuple[int, ...]) -> None:
        if tuple(stated.tolist()) != expected:
            raise EngineError(
                f"rank {self._edge.src} sent (step, rows, row bytes, incarnation) {tuple(stated.tolist())} "
                f"to rank {self._edge.dst}, which expected {expected}"
            )


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
    store_path: Path,
    device: torch.device,
    timeout_s: float,
    spans: SpanRing,
) -> Communicator:
    """Joins the world of `sum(widths)` ranks that meet at the file `store_path`.

    Blocks until all have come, PeerLost after `timeout_s`. The meeting point is a file, so that no
    socket listens beside gloo's own, which GLOO_SOCKET_IFNAME binds.
    """
    world, timeout = sum(widths), timedelta(seconds=timeout_s)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world == 1:
        return _communicator(Mesh(widths, rank, Alone()), {}, {}, spans)
    with _peers():
        store = dist.FileStore(str(store_path), world)  # type: ignore[attr-defined]
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        tensor = None
        for ranks in stage_ranks(widths):
            group = _group(ranks, timeout)
            if rank in ranks and len(ranks) > 1:
                tensor = JoinedGroup(group, len(ranks), spans)
        forward = {edge: _group((edge.src, edge.dst), timeout) for edge in forward_edges(widths)}
        sampled = {edge: _group((edge.src, edge.dst), timeout) for edge in sampled_edges(widths)}
        _connect(rank, {**forward, **sampled}, device)
        if tensor is not None:
            tensor.all_reduce(torch.zeros(1, device=device))
    return _communicator(Mesh(widths, rank, tensor or Alone()), forward, sampled, spans)


def _connect(rank: int, edges: dict[Edge, dist.ProcessGroup], device: torch.device) -> None:
    """One byte over every edge, in one order everywhere: NCCL connects at the first message, and its
    sender would wait for a receiver that is not there yet."""
    for edge, group in edges.items():
        byte = torch.zeros(1, dtype=torch.uint8, device=device)
        if rank == edge.src:
            dist.send(byte, edge.dst, group=group)
        elif rank == edge.dst:
            dist.recv(byte, edge.src, group=group)


def _group(ranks: Iterable[int], timeout: timedelta) -> dist.ProcessGroup:
    """Every rank makes every group, in the same order: torch names groups by their count."""
    group: dist.ProcessGroup = dist.new_group(sorted(ranks), timeout=timeout)
    return group


def _communicator(
    mesh: Mesh,
    forward: dict[Edge, dist.ProcessGroup],
    sampled: dict[Edge, dist.ProcessGroup],
    spans: SpanRing,
) -> Communicator:
    def sender(groups: dict[Edge, dist.ProcessGroup]) -> Sender:
        mine = [(edge, group) for edge, group in groups.items() if edge.src == mesh.rank]
        return Sender(mine, mesh.pp_size + 1, spans)

    def receiver(groups: dict[Edge, dist.ProcessGroup]) -> Receiver | None:
        mine = [
            Receiver(edge, group, spans) for edge, group in groups.items() if edge.dst == mesh.rank
        ]
        return mine[0] if mine else None

    return Communicator(
        mesh, sender(forward), receiver(forward), sender(sampled), receiver(sampled)
    )
