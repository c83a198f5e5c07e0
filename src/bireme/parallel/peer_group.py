"""A tensor group on GPUs of one host: sums of hidden states go through one another's memory, all else over NCCL.

A sum of one token's hidden states takes NCCL as long as hundreds of them do, and it knows nothing of the norm behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, _SymmetricMemory

from bireme.kernels.choice import has_kernels
from bireme.kernels.device_spans import DeviceSpans
from bireme.kernels.late_rows import LateRows, are_parts_worth
from bireme.parallel.mesh import TensorGroup
from bireme.parallel.peer_memory import have_peer_access, mapped
from bireme.parallel.peer_window import Window, open_window
from bireme.parallel.sum_table import SumTable, Way, measured_table
from bireme.trace import SpanKind, SpanWriter

_FEW_ROWS = 256  # that every rank can add up whole
_WHOLE_ROWS = 16  # up to which so few programs read them that parts take longer than they save
_MOST_ROWS = 2**31 - 1
_ALIGNMENT = 512  # bytes
_MOST_SUM_BYTES = 2**31 - 1  # a kernel's place in them is an int32
_POLLS_PER_S = 4e6  # at most; a look at a row takes a quarter of a microsecond or more
_MOST_POLLS = 2**31 - 1


class PeerGroup(TensorGroup):
    """All ranks call everything in the same order with the same shapes, on one stream; beside it, copies bring what one
    of two ranks made of a prompt's rows to the other."""

    def __init__(
        self,
        others: TensorGroup,
        memory: tuple[torch.Tensor, _SymmetricMemory],
        window: Window | None,
        row_bytes: int,
        sum_bytes: int,
        timeout_s: float,
        spans: DeviceSpans,
    ) -> None:
        from bireme.kernels.gpu.peer_sum import Inboxes
        from bireme.kernels.gpu.sharded_sum import NUM_PROGRAMS, Addends, Rooms

        self._others, self._spans = others, spans
        self._memory, self._handle = memory
        self._window = window  # unmapped when nobody holds it
        device, rank, size = self._memory.device, self._handle.rank, self._handle.world_size
        addresses = torch.tensor(
            [
                self._handle.get_buffer(peer, self._memory.shape, torch.uint8).data_ptr()
                for peer in range(size)
            ],
            device=device,
        )
        polls = min(_MOST_POLLS, int(timeout_s * _POLLS_PER_S))
        numbers = torch.zeros(_FEW_ROWS + NUM_PROGRAMS + 1, dtype=torch.int32, device=device)
        self._inboxes = Inboxes(addresses, numbers[:_FEW_ROWS], rank, row_bytes // 4, polls)
        start = _inbox_bytes(size, row_bytes)
        if window is None:
            behind = start + Rooms.num_bytes(size, sum_bytes)
            added = Addends(addresses + behind, self._memory[behind:])
        else:
            sources = torch.tensor(window.sources, device=device)
            added = Addends(sources, window.memory, window.part_bytes)
        other = None
        if size == 2:
            other = self._handle.get_buffer(1 - rank, self._memory.shape, torch.uint8)[start:]
        self._rooms = Rooms(
            addresses=addresses + start,
            meetings=numbers[_FEW_ROWS:-1],
            brought=numbers[-1:],
            own=self._memory[start:],
            other=other,
            added=added,
            rank=rank,
            sum_bytes=sum_bytes,
            most_polls=polls,
        )
        self._aside = torch.cuda.Stream(device, priority=-1)
        self._is_awaited = True  # what the other rank brings
        self._memory.zero_()
        others.all_reduce(torch.zeros(1, device=device))  # nobody writes before all have
        torch.cuda.synchronize(device)
        self._table = SumTable(((_FEW_ROWS, Way.ONE_SHOT), (_MOST_ROWS, Way.NCCL)))
        if sum_bytes >= row_bytes:
            self._table = self._measured(row_bytes, sum_bytes)

    def _measured(self, row_bytes: int, sum_bytes: int) -> SumTable:
        """Of rows of up to `row_bytes`, and of up to `sum_bytes` together."""
        from bireme.kernels.gpu.few_rows import MOST_ROWS
        from bireme.kernels.gpu.peer_sum import peer_sum_add_norm
        from bireme.kernels.gpu.sharded_sum import sharded_sum_add_norm

        width, device = row_bytes // 2, self._memory.device  # of bfloat16
        weight = torch.ones(width, dtype=torch.bfloat16, device=device)
        stamps = self._spans.unread

        def two_shot(x: torch.Tensor) -> object:
            place = self._rooms.addends(len(x), width, x.dtype)
            assert place is not None
            return sharded_sum_add_norm(self._rooms, place, x, weight, 1e-5, stamps=stamps)

        ways = {
            Way.ONE_SHOT: lambda x: peer_sum_add_norm(
                self._inboxes, x, x, weight, 1e-5, stamps=stamps
            ),
            Way.TWO_SHOT: two_shot,
            Way.NCCL: lambda x: self._others.all_reduce_add_norm(x, x, weight, 1e-5),
        }
        most = sum_bytes // row_bytes
        rows = {
            Way.ONE_SHOT: range(1, _FEW_ROWS + 1 if row_bytes % 4 == 0 else 1),
            # fewer come of products that stream weights, and cannot write to others
            Way.TWO_SHOT: range(MOST_ROWS + 1, most + 1),
            Way.NCCL: range(1, max(_FEW_ROWS, most) + 1),
        }
        return measured_table(ways, rows, width, self._others, device)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        from bireme.kernels.gpu.peer_sum import peer_sum

        if not self._inboxes.suits(x) or self._table.way(len(x)) is Way.NCCL:
            return self._others.all_reduce(x)
        with self._spans.stamped(SpanKind.ALL_REDUCE, x.nbytes) as stamps:
            return peer_sum(self._inboxes, x, stamps)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self._others.all_gather(x)

    def place_of_addends(
        self, num_rows: int, width: int, dtype: torch.dtype
    ) -> torch.Tensor | None:
        if self._table.way(num_rows) is not Way.TWO_SHOT:
            return None
        return self._rooms.addends(num_rows, width, dtype)

    def rows_kept(self, num_rows: int) -> slice:
        return super().rows_kept(num_rows) if self._window is None else self._rooms.share(num_rows)

    def takes_parts(self, num_rows: int) -> bool:
        return num_rows > _WHOLE_ROWS and self._table.way(num_rows) is Way.ONE_SHOT

    def _way(self, x: torch.Tensor) -> Way:
        """The table's, where it can be gone for addends like x."""
        assert self._is_awaited, "late rows arrive before the next sum"
        way = self._table.way(len(x))
        if way is Way.ONE_SHOT and self._inboxes.suits(x):
            return way
        if self.place_of_addends(len(x), x.shape[1], x.dtype) is not None:
            return Way.TWO_SHOT
        return Way.NCCL

    def all_reduce_add(self, addend: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        from bireme.kernels.gpu.sharded_sum import sharded_sum_add

        way = self._way(x)
        if way is Way.NCCL:
            return self._others.all_reduce_add(addend, x)
        if way is Way.ONE_SHOT:
            return super().all_reduce_add(addend, x)
        with self._spans.stamped(SpanKind.ALL_REDUCE, x.nbytes) as stamps:
            return sharded_sum_add(self._rooms, addend, x, stamps)

    def all_reduce_add_norm(
        self,
        addend: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        offset: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor | LateRows]:
        from bireme.kernels.gpu.peer_sum import peer_sum_add_norm
        from bireme.kernels.gpu.sharded_sum import sharded_sum_add_norm

        way, is_brought = self._way(x), self._are_brought(len(x))
        if way is Way.NCCL:
            return self._others.all_reduce_add_norm(addend, x, weight, eps, offset)
        if way is Way.ONE_SHOT:
            with self._spans.stamped(SpanKind.ALL_REDUCE, x.nbytes) as stamps:
                return peer_sum_add_norm(self._inboxes, addend, x, weight, eps, offset, stamps)
        kind = SpanKind.REDUCE_SCATTER if is_brought else SpanKind.ALL_REDUCE
        with self._spans.stamped(kind, x.nbytes) as stamps:
            total, normed = sharded_sum_add_norm(
                self._rooms, addend, x, weight, eps, offset, stamps, is_brought=is_brought
            )
        return total, self._on_the_way(normed) if is_brought else normed

    def _are_brought(self, num_rows: int) -> bool:
        """Whether something can be multiplied meanwhile."""
        share = self._rooms.share(num_rows)
        own = share.stop - share.start
        return self._rooms.other is not None and are_parts_worth(own, num_rows - own)

    def _on_the_way(self, normed: torch.Tensor) -> LateRows:
        """By a copy engine, while the multiprocessors go on with this rank's own rows."""
        num_rows, width = normed.shape
        device = normed.device
        self._aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._aside):
            self._rooms.bring(num_rows, width, normed.dtype)
        self._is_awaited = False

        def arrive() -> None:
            with self._spans.stamped(SpanKind.GATHER_WAIT, normed.nbytes) as stamps:
                self._rooms.await_brought(stamps)
            # this rank's own copy, too, is over before what it copies is overwritten
            torch.cuda.current_stream(device).wait_stream(self._aside)
            self._is_awaited = True

        return LateRows(normed, self._rooms.share(num_rows), arrive)


def _inbox_bytes(num_ranks: int, row_bytes: int) -> int:
    from bireme.kernels.gpu.peer_sum import Inboxes

    return Inboxes.num_bytes(_FEW_ROWS, num_ranks, row_bytes // 4)


def peer_group(
    others: TensorGroup,
    group: dist.ProcessGroup,
    ranks: Sequence[int],
    rank: int,
    row_bytes: int,
    sum_bytes: int,
    device: torch.device,
    store: Store,
    timeout_s: float,
    spans: SpanWriter,
) -> TensorGroup:
    """For rows of up to `row_bytes`, and of up to `sum_bytes` together; `others` itself where these GPUs cannot write
    each other's memory."""
    if not row_bytes or not has_kernels(device) or not isinstance(spans, DeviceSpans):
        return others
    if not have_peer_access(list(combinations(ranks, 2)), rank, device, store):
        return others
    from bireme.kernels.gpu.sharded_sum import Rooms

    sum_bytes = min(_MOST_SUM_BYTES, sum_bytes) // _ALIGNMENT * _ALIGNMENT
    num_bytes = _inbox_bytes(len(ranks), row_bytes) + Rooms.num_bytes(len(ranks), sum_bytes)
    window, own_store = None, PrefixStore(f"window/{'-'.join(map(str, ranks))}", store)
    if sum_bytes and len(ranks) == 2:
        share_bytes = sum_bytes // 2 + row_bytes
        window = open_window(share_bytes, ranks, rank, device, own_store, timeout_s)
    if window is None:
        num_bytes += sum_bytes  # for the addends
    memory = mapped(num_bytes, ranks, group, rank, device, store)
    return PeerGroup(others, memory, window, row_bytes, sum_bytes, timeout_s, spans)
