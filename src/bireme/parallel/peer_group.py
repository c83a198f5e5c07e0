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
from bireme.parallel.attempts import made_by_all
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
_INSTEAD = "ranks sum over NCCL, and not through each other's memory"
_POLLS_PER_S = 4e6  # at most; a look at a row takes a quarter of a microsecond or more
_MOST_POLLS = 2**31 - 1


class PeerGroup(TensorGroup):
    """All ranks call everything in the same order with the same shapes, on one stream."""

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
        numbers = torch.zeros(_FEW_ROWS + NUM_PROGRAMS, dtype=torch.int32, device=device)
        self._inboxes = Inboxes(addresses, numbers[:_FEW_ROWS], rank, row_bytes // 4, polls)
        start = _inbox_bytes(size, row_bytes)
        if window is None:
            behind = start + Rooms.num_bytes(size, sum_bytes)
            added = Addends(addresses + behind, self._memory[behind:])
        else:
            sources = torch.tensor(window.sources, device=device)
            added = Addends(sources, window.memory, window.part_bytes)
        self._rooms = Rooms(
            addresses + start, numbers[_FEW_ROWS:], self._memory[start:], added, rank, sum_bytes,
            polls,
        )  # fmt: skip
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

    def takes_parts(self, num_rows: int) -> bool:
        return num_rows > _WHOLE_ROWS and self._table.way(num_rows) is Way.ONE_SHOT

    def _way(self, x: torch.Tensor) -> Way:
        """The table's, where it can be gone for addends like x."""
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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from bireme.kernels.gpu.peer_sum import peer_sum_add_norm
        from bireme.kernels.gpu.sharded_sum import sharded_sum_add_norm

        way = self._way(x)
        if way is Way.NCCL:
            return self._others.all_reduce_add_norm(addend, x, weight, eps, offset)
        with self._spans.stamped(SpanKind.ALL_REDUCE, x.nbytes) as stamps:
            if way is Way.TWO_SHOT:
                return sharded_sum_add_norm(self._rooms, addend, x, weight, eps, offset, stamps)
            return peer_sum_add_norm(self._inboxes, addend, x, weight, eps, offset, stamps)


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
    each other's memory, or it cannot be mapped."""
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
    memory = made_by_all(
        lambda: mapped(num_bytes, ranks, group, rank, device, store),
        "memory",
        _INSTEAD,
        ranks,
        rank,
        own_store,
    )
    if memory is None:
        return others
    return PeerGroup(others, memory, window, row_bytes, sum_bytes, timeout_s, spans)
