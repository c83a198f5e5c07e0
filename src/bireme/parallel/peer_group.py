"""A tensor group on GPUs of one host: sums of a few rows go through one another's memory, all else over NCCL.

A sum of one token's hidden states takes NCCL as long as hundreds of them do.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, _SymmetricMemory

from bireme.kernels.choice import has_kernels
from bireme.parallel.mesh import TensorGroup
from bireme.parallel.peer_memory import have_peer_access, mapped
from bireme.trace import SpanKind, SpanWriter

_MOST_ROWS = 256  # beyond which NCCL is as fast
_POLLS_PER_S = 4e6  # at most; a look at a row takes a quarter of a microsecond or more
_MOST_POLLS = 2**31 - 1


class PeerGroup(TensorGroup):
    """All ranks call everything in the same order with the same shapes, on one stream."""

    def __init__(
        self,
        others: TensorGroup,
        memory: tuple[torch.Tensor, _SymmetricMemory],
        row_bytes: int,
        timeout_s: float,
        spans: SpanWriter,
    ) -> None:
        from bireme.kernels.gpu.peer_sum import Inboxes

        self._others, self._spans = others, spans
        self._memory, self._handle = memory
        device = self._memory.device
        addresses = [
            self._handle.get_buffer(peer, self._memory.shape, torch.uint8).data_ptr()
            for peer in range(self._handle.world_size)
        ]
        self._inboxes = Inboxes(
            torch.tensor(addresses, device=device),
            torch.zeros(_MOST_ROWS, dtype=torch.int32, device=device),
            self._handle.rank,
            row_bytes // 4,
            min(_MOST_POLLS, int(timeout_s * _POLLS_PER_S)),
        )
        self._memory.zero_()
        others.all_reduce(torch.zeros(1, device=device))  # nobody writes before all have
        torch.cuda.synchronize(device)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        from bireme.kernels.gpu.peer_sum import peer_sum

        if not self._inboxes.suits(x):
            return self._others.all_reduce(x)
        with self._spans.span(SpanKind.ALL_REDUCE, x.nbytes):
            return peer_sum(self._inboxes, x)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self._others.all_gather(x)

    def all_reduce_add_norm(
        self,
        addend: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        offset: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from bireme.kernels.gpu.peer_sum import peer_sum_add_norm

        if not self._inboxes.suits(addend):
            return super().all_reduce_add_norm(addend, x, weight, eps, offset)
        with self._spans.span(SpanKind.ALL_REDUCE, addend.nbytes):
            return peer_sum_add_norm(self._inboxes, addend, x, weight, eps, offset)


def peer_group(
    others: TensorGroup,
    group: dist.ProcessGroup,
    ranks: Sequence[int],
    rank: int,
    row_bytes: int,
    device: torch.device,
    store: Store,
    timeout_s: float,
    spans: SpanWriter,
) -> TensorGroup:
    """For rows of up to `row_bytes`; `others` itself where these GPUs cannot write each other's memory."""
    if not row_bytes or not has_kernels(device):
        return others
    if not have_peer_access(list(combinations(ranks, 2)), rank, device, store):
        return others
    from bireme.kernels.gpu.peer_sum import Inboxes

    num_bytes = Inboxes.num_bytes(_MOST_ROWS, len(ranks), row_bytes // 4)
    memory = mapped(num_bytes, ranks, group, rank, device, store)
    return PeerGroup(others, memory, row_bytes, timeout_s, spans)
