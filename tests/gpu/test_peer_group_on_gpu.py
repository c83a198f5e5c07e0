"""Sums through one another's memory on two real GPUs: launched, captured, and in any order of both."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from bireme.parallel.collectives import join
from bireme.parallel.mesh import TensorGroup
from bireme.parallel.peer_group import PeerGroup
from bireme.trace import SpanRing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
WIDTH, DTYPE = 4096, torch.bfloat16


def given(seed: int, num_rows: int, device: torch.device) -> torch.Tensor:
    """Addends of both ranks and the residual, [3, T, D]; the same on both."""
    generator = torch.Generator().manual_seed(1000 * seed + num_rows)
    return torch.randn(3, num_rows, WIDTH, generator=generator).to(DTYPE).to(device)


class Captured:
    """A sum and, behind it, one with residual and norm, as a graph of `num_rows`."""

    def __init__(self, group: TensorGroup, num_rows: int, device: torch.device) -> None:
        self.addend, self.x, self.other = torch.zeros(
            3, num_rows, WIDTH, dtype=DTYPE, device=device
        )
        weight = torch.ones(WIDTH, dtype=DTYPE, device=device)

        def both() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            total = group.all_reduce(self.addend.clone())
            return total, *group.all_reduce_add_norm(self.other, self.x, weight, 1e-5)

        aside = torch.cuda.Stream(device)
        with torch.cuda.stream(aside):
            both()
        torch.cuda.synchronize(device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.made = both()

    def check(self, rank: int, parts: torch.Tensor) -> None:
        self.addend.copy_(parts[rank])
        self.other.copy_(parts[rank])
        self.x.copy_(parts[2])
        for made in self.made:
            made.fill_(torch.nan)
        self.graph.replay()
        expected = (parts[0].float() + parts[1].float()).to(DTYPE)
        assert torch.equal(self.made[0], expected)
        assert torch.equal(self.made[1], parts[2] + expected)
        assert not self.made[2].isnan().any()


def work(rank: int, meeting: str) -> None:
    device = torch.device(f"cuda:{rank}")
    spans = SpanRing.create(1 << 12)
    row_bytes = WIDTH * DTYPE.itemsize
    comm = join((2,), rank, Path(meeting), device, 60.0, spans, row_bytes=row_bytes)
    group = comm.mesh.tensor
    assert isinstance(group, PeerGroup)
    graphs = {num_rows: Captured(group, num_rows, device) for num_rows in (1, 8, 200)}
    orders = [(1, 8), (8, 1), (8, 200), (200, 1), (1, 1), (200, 200)]
    for seed, (order, eager) in enumerate(product(orders, (0, 1, 7, 256, 300))):
        for num_rows in order:
            graphs[num_rows].check(rank, given(seed, num_rows, device))
            if eager:  # more rows than there is room for go over NCCL
                parts = given(seed, eager, device)
                total = group.all_reduce(parts[rank].clone())
                assert torch.equal(total, (parts[0].float() + parts[1].float()).to(DTYPE))
    torch.cuda.synchronize(device)
    for captured in graphs.values():
        captured.graph.reset()
    comm.leave()


def test_graphs_and_launches_in_any_order(tmp_path: Path) -> None:
    multiprocessing.spawn(work, (str(tmp_path / "meeting"),), nprocs=2)
