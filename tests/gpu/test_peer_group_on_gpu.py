"""Sums through one another's memory between two real ranks: launched, captured, and in any order of both."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from bireme.kernels.device_spans import DeviceSpans
from bireme.kernels.functional import rms_norm_reference
from bireme.parallel.collectives import join
from bireme.parallel.mesh import TensorGroup
from bireme.parallel.peer_group import PeerGroup
from bireme.parallel.peer_room import PeerRoom
from bireme.parallel.sum_table import SumTable, Way
from bireme.trace import SpanRing

pytestmark = pytest.mark.gpu
MOST_ROWS = 1501  # shares of two sizes
KINDS = [(4096, torch.bfloat16), (1000, torch.float16), (96, torch.float32)]  # width and dtype


@dataclass(frozen=True)
class Rows:
    """What is summed."""

    width: int
    dtype: torch.dtype
    device: torch.device

    def given(self, seed: int, num_rows: int) -> torch.Tensor:
        """Addends of both ranks and the residual, [3, T, D]; the same on both."""
        generator = torch.Generator().manual_seed(1000 * seed + num_rows)
        drawn = torch.randn(3, num_rows, self.width, generator=generator)
        return drawn.to(self.dtype).to(self.device)

    def sum(self, parts: torch.Tensor) -> torch.Tensor:
        return (parts[0].float() + parts[1].float()).to(self.dtype)


class Captured:
    """A sum; one with residual and norm, of an addend that lies where it is best put; one with that residual: as a
    graph of `num_rows`."""

    def __init__(self, group: TensorGroup, num_rows: int, rows: Rows) -> None:
        self.rows, shape, dtype = rows, (num_rows, rows.width), rows.dtype
        self.addend, self.x, self.other = torch.zeros(3, *shape, dtype=dtype, device=rows.device)
        self.weight = torch.linspace(0.5, 2.0, rows.width, device=rows.device).to(dtype)

        def all_of_them() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            total = group.all_reduce(self.addend.clone())
            place = group.place_of_addends(*shape, dtype)
            addend = self.other.clone() if place is None else place.copy_(self.other)
            held, normed = group.all_reduce_add_norm(addend, self.x, self.weight, 1e-5)
            normed = normed.clone()  # it lies there until the next sum
            return total, normed, group.all_reduce_add(self.addend.clone(), held)

        aside = torch.cuda.Stream(rows.device)
        with torch.cuda.stream(aside):
            all_of_them()
        torch.cuda.synchronize(rows.device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.made = all_of_them()

    def check(self, rank: int, parts: torch.Tensor) -> None:
        self.addend.copy_(parts[rank])
        self.other.copy_(parts[rank])
        self.x.copy_(parts[2])
        for made in self.made:
            made.fill_(torch.nan)
        self.graph.replay()
        added = self.rows.sum(parts)
        held = parts[2] + added
        assert torch.equal(self.made[0], added)
        normed = rms_norm_reference(held, self.weight, 1e-5)
        assert torch.allclose(self.made[1], normed, rtol=2e-2, atol=1e-3)
        assert torch.equal(self.made[2], held + added)


def check_stores(device: torch.device) -> None:
    """What ranks tell one another goes by 16 bytes, of which four are the number: no store or load is smaller."""
    from bireme.kernels.gpu.peer_sum import peer_sum_kernel

    compiled = peer_sum_kernel.device_caches[device.index][0].values()
    assert compiled
    for kernel in compiled:
        told = re.findall(r"st\.global\.wt\S*|ld\.volatile\.global\S*", kernel.asm["ptx"])
        assert {one[:2] for one in told} == {"st", "ld"}
        assert all(one.endswith(".v4.b32") for one in told), told


def check_in_turn(
    group: TensorGroup,
    rank: int,
    rows: Rows,
    sizes: Sequence[int],
    turns: Sequence[tuple[Sequence[int], int]],
) -> None:
    """Replays in an order of sizes, with launches of a size between them."""
    graphs = {num_rows: Captured(group, num_rows, rows) for num_rows in sizes}
    for seed, (order, eager) in enumerate(turns):
        for num_rows in order:
            graphs[num_rows].check(rank, rows.given(seed, num_rows))
            if eager:
                parts = rows.given(seed, eager)
                added = rows.sum(parts)
                assert torch.equal(group.all_reduce(parts[rank].clone()), added)
                whole = group.all_reduce_add(parts[rank].clone(), parts[2])
                assert torch.equal(whole, parts[2] + added)
    torch.cuda.synchronize(rows.device)
    for captured in graphs.values():
        captured.graph.reset()


def check_way(group: PeerGroup, rows: Rows, rank: int, way: Way) -> None:
    """What the table says is what is done: the kernels of the other ways count nothing."""

    def counts() -> tuple[int, int]:
        return int(group._inboxes.numbers[0]), int(group._rooms.meetings[0])

    parts, before = rows.given(0, 200), counts()
    group.all_reduce_add_norm(parts[rank].clone(), parts[2], parts[2][0], 1e-5)
    told = tuple(after > earlier for after, earlier in zip(counts(), before, strict=True))
    assert told == (way is Way.ONE_SHOT, way is Way.TWO_SHOT)
    assert group.takes_parts(200) == (way is Way.ONE_SHOT)
    if way is Way.ONE_SHOT and rows.dtype != torch.float32:
        halves = torch.stack([parts[rank].float() / 2] * 2)
        held, normed = group.all_reduce_add_norm(halves, parts[2], parts[2][0], 1e-5)
        expected = parts[2] + rows.sum(parts)
        assert torch.equal(held, expected)
        made = rms_norm_reference(expected, parts[2][0], 1e-5)
        assert torch.allclose(normed, made, rtol=2e-2, atol=1e-3)
        assert torch.equal(group.all_reduce_add(halves, parts[2]), expected)


def work(rank: int, meeting: str, devices: tuple[int, int], width: int, dtype: torch.dtype) -> None:
    device = torch.device("cuda", devices[rank])
    rows, row_bytes = Rows(width, dtype, device), width * dtype.itemsize
    comm = join(
        (2,), rank, Path(meeting), device, 60.0, DeviceSpans(SpanRing.create(1 << 12), device),
        room=PeerRoom(row_bytes=row_bytes, sum_bytes=-(-MOST_ROWS * row_bytes // 512) * 512),
    )  # fmt: skip
    group = comm.mesh.tensor
    assert isinstance(group, PeerGroup)
    assert group._window is not None, "products write rows to the rank that adds them up"
    assert group.place_of_addends(MOST_ROWS + 5, width, dtype) is None
    ways = list(Way)
    table = torch.tensor(
        [(most, ways.index(way)) for most, way in group._table.bounds], device=device
    )
    assert (group.all_gather(table) == table).all(), "ranks go the same way"
    sizes = (1, 8, 200, 301, MOST_ROWS, MOST_ROWS + 5)
    check_in_turn(
        group, rank, rows, sizes, list(product(product(sizes, sizes), (0, 1, 7, 256, 300)))
    )
    for way in Way:
        group._table = SumTable(((1 << 31, way),))
        check_way(group, rows, rank, way)
        check_in_turn(group, rank, rows, sizes, list(product((sizes, sizes[::-1]), (0, 7, 300))))
    torch.cuda.synchronize(device)
    check_stores(device)
    comm.leave()


@pytest.mark.parametrize(("width", "dtype"), KINDS)
def test_graphs_and_launches_in_any_order(
    tmp_path: Path, peers: tuple[int, int], width: int, dtype: torch.dtype
) -> None:
    multiprocessing.spawn(work, (str(tmp_path / "meeting"), peers, width, dtype), nprocs=2)
