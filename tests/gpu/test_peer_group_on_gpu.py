"""Sums through one another's memory on two real GPUs: launched, captured, and in any order of both."""

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
from bireme.kernels.late_rows import (
    LateRows,
    columns_meanwhile,
    multiply_into,
    rows_in_order,
    whole_rows,
)
from bireme.kernels.linear import linear
from bireme.parallel.collectives import join
from bireme.parallel.mesh import TensorGroup
from bireme.parallel.peer_group import PeerGroup
from bireme.parallel.peer_room import PeerRoom
from bireme.parallel.sum_table import SumTable, Way
from bireme.trace import SpanRing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
MOST_ROWS = 1501  # shares of two sizes
OUTPUTS = (
    11264  # of a product, some of which a rank's own rows of so many have before the others come
)
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


@dataclass(frozen=True)
class Sums:
    """A sum; two with residual and norm, of addends that products write where they are best put, and the product of the
    first norm between them, as in a layer; and one with that residual. One rank comes to them later than the other."""

    group: TensorGroup
    rows: Rows
    weight: torch.Tensor
    outputs: torch.Tensor
    identity: torch.Tensor

    @classmethod
    def of(cls, group: TensorGroup, rows: Rows) -> Sums:
        device, dtype = rows.device, rows.dtype
        drawn = torch.randn(OUTPUTS, rows.width, generator=torch.Generator().manual_seed(7))
        outputs = drawn.mul_(rows.width**-0.5).to(dtype).to(device)
        weight = torch.linspace(0.5, 2.0, rows.width, device=device).to(dtype)
        return cls(group, rows, weight, outputs, torch.eye(rows.width, dtype=dtype, device=device))

    def __call__(
        self, addend: torch.Tensor, x: torch.Tensor, pauses: Sequence[int]
    ) -> tuple[torch.Tensor, ...]:
        total = self.group.all_reduce(addend.clone())
        torch.cuda._sleep(pauses[0])
        held, normed = self._normed(addend, x)
        torch.cuda._sleep(pauses[1])
        product = linear(normed, self.outputs)
        torch.cuda._sleep(pauses[2])
        held, normed = self._normed(addend, held)
        torch.cuda._sleep(pauses[3])
        normed = whole_rows(normed).clone()  # it lies there until the next sum
        return total, product, normed, self.group.all_reduce_add(addend.clone(), held)

    def _normed(
        self, addend: torch.Tensor, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | LateRows]:
        kept = self.group.rows_kept(len(addend))
        place = self.group.place_of_addends(*addend.shape, addend.dtype)
        given = (
            addend.clone() if place is None else multiply_into(place, addend, self.identity, kept)
        )
        return self.group.all_reduce_add_norm(given, x, self.weight, 1e-5)

    def check(self, made: Sequence[torch.Tensor], parts: torch.Tensor) -> None:
        added = self.rows.sum(parts)
        assert torch.equal(made[0], added)
        held = parts[2] + added
        product = rms_norm_reference(held, self.weight, 1e-5).float() @ self.outputs.float().T
        assert torch.allclose(made[1].float(), product, rtol=2e-2, atol=3e-2)
        held = held + added
        normed = rms_norm_reference(held, self.weight, 1e-5)
        assert torch.allclose(made[2], normed, rtol=2e-2, atol=1e-3)
        assert torch.equal(made[3], held + added)


def pauses(rank: int, seed: int) -> list[int]:
    """Cycles that a rank is held up for, up to some tens of microseconds, before each of four steps."""
    generator = torch.Generator().manual_seed(2 * seed + rank)
    drawn = torch.randint(0, 60_000, (4,), generator=generator)
    return (drawn * torch.randint(0, 2, (4,), generator=generator)).tolist()


class Captured:
    """All of them as a graph of `num_rows`."""

    def __init__(self, sums: Sums, num_rows: int, rank: int) -> None:
        self.sums, rows, held_up = sums, sums.rows, pauses(rank, num_rows)
        self.addend, self.x = torch.zeros(
            2, num_rows, rows.width, dtype=rows.dtype, device=rows.device
        )
        aside = torch.cuda.Stream(rows.device)
        with torch.cuda.stream(aside):
            sums(self.addend, self.x, held_up)
        torch.cuda.synchronize(rows.device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.made = sums(self.addend, self.x, held_up)

    def check(self, rank: int, parts: torch.Tensor) -> None:
        self.addend.copy_(parts[rank])
        self.x.copy_(parts[2])
        for made in self.made:
            made.fill_(torch.nan)
        self.graph.replay()
        self.sums.check(self.made, parts)


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
    sums = Sums.of(group, rows)
    graphs = {num_rows: Captured(sums, num_rows, rank) for num_rows in sizes}
    for seed, (order, eager) in enumerate(turns):
        for num_rows in order:
            graphs[num_rows].check(rank, rows.given(seed, num_rows))
            if eager:
                parts = rows.given(seed, eager)
                sums.check(sums(parts[rank], parts[2], pauses(rank, seed)), parts)
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
    many = rows.given(0, MOST_ROWS)
    normed = group.all_reduce_add_norm(many[rank].clone(), many[2], many[2][0], 1e-5)[1]
    assert isinstance(normed, LateRows) == (way is Way.TWO_SHOT)
    if isinstance(normed, LateRows):
        with pytest.raises(AssertionError, match="late rows arrive before"):
            group.all_reduce_add(many[rank], many[2])
    expected = rms_norm_reference(many[2] + rows.sum(many), many[2][0], 1e-5)
    assert torch.allclose(whole_rows(normed), expected, rtol=2e-2, atol=1e-3)
    if way is Way.ONE_SHOT and rows.dtype != torch.float32:
        halves = torch.stack([parts[rank].float() / 2] * 2)
        held, normed = group.all_reduce_add_norm(halves, parts[2], parts[2][0], 1e-5)
        expected = parts[2] + rows.sum(parts)
        assert torch.equal(held, expected)
        made = rms_norm_reference(expected, parts[2][0], 1e-5)
        assert torch.allclose(whole_rows(normed), made, rtol=2e-2, atol=1e-3)
        assert torch.equal(group.all_reduce_add(halves, parts[2]), expected)


def work(rank: int, meeting: str, width: int, dtype: torch.dtype) -> None:
    assert 0 < columns_meanwhile(MOST_ROWS // 2, MOST_ROWS, OUTPUTS) < OUTPUTS
    is_split = len(rows_in_order(slice(0, MOST_ROWS // 2), MOST_ROWS, width)) == 2
    assert is_split == (width == KINDS[0][0]), "both ways are seen"
    device = torch.device(f"cuda:{rank}")
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
    check_in_turn(group, rank, rows, sizes, list(product(product(sizes, sizes), (0, 7, 256, 700))))
    for way in Way:
        group._table = SumTable(((1 << 31, way),))
        check_way(group, rows, rank, way)
        check_in_turn(group, rank, rows, sizes, list(product((sizes, sizes[::-1]), (0, 7, 700))))
    torch.cuda.synchronize(device)
    check_stores(device)
    comm.leave()


@pytest.mark.parametrize(("width", "dtype"), KINDS)
def test_graphs_and_launches_in_any_order(tmp_path: Path, width: int, dtype: torch.dtype) -> None:
    multiprocessing.spawn(work, (str(tmp_path / "meeting"), width, dtype), nprocs=2)
