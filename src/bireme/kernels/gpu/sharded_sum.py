"""Sums of many rows over GPUs that map each other's memory: a rank adds up its share of the rows, and tells all others
what it made of them.

What it adds up lies with the other ranks or, where products write each row to the rank that it is for
(`parallel/peer_window.py`), with itself: what is read over a link is waited for, while a product's writes are over when
it is. So each row crosses a link once on its way to the sum and once on its way back, and the residual and RMSNorm are
of a share of the rows on each rank (sequence parallelism, arXiv:2205.05198). Programs of the same number on all ranks
meet before, when every rank's addends are there, and after, when all that was read has been read and all that was made
has come. How often a program has met the others lies in memory and is counted up, so that eager steps and replays of
any graphs may follow one another.
The flags are written by atomics, which GPUs can use on one another's memory over NVLink.
Shapes: T rows, D elements, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from bireme.kernels.gpu.stamp import begun_at, stamp

NUM_PROGRAMS = 128  # about one on each multiprocessor of a Hopper GPU: twice as many are no faster


@triton.jit
def _meet(
    rooms, meeting, most_polls, RANK: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Until the programs of this number on all ranks are at this meeting or a later one."""
    tl.debug_barrier()  # what all threads have written is there before it is told
    at = tl.program_id(0) * W
    for step in tl.static_range(1, W):
        flags = tl.load(rooms + (RANK + step) % W).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(flags + at + RANK, meeting, sem="release", scope="sys")
    mine = tl.load(rooms + RANK).to(tl.pointer_type(tl.int32)) + at
    for step in tl.static_range(1, W):
        flag = mine + (RANK + step) % W
        ahead = tl.atomic_add(flag, 0, sem="acquire", scope="sys") - meeting
        polls = 0
        while (ahead < 0) & (polls < most_polls):
            ahead = tl.atomic_add(flag, 0, sem="acquire", scope="sys") - meeting
            polls += 1
        tl.device_assert(ahead >= 0, "a rank did not come to a sum in time")
    tl.debug_barrier()


@triton.jit(do_not_specialize=["T", "skipped", "most_polls"])
def sharded_sum_kernel(
    x, weight, total, rooms, addends, meetings, stamps, T, skipped, eps, offset, most_polls,
    RANK: tl.constexpr, W: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, IS_OF_SHARE: tl.constexpr,
    IS_ALIGNED: tl.constexpr, RESULTS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_OFFSET: tl.constexpr,
    IS_STAMPED: tl.constexpr,
):  # fmt: skip
    """`rooms` int64 [W] addresses of flags and, RESULTS bytes behind them, of results [T, D]; `addends` int64 [W], of
    what each rank adds, `skipped` bytes before it: [T, D], or this rank's share of it; `meetings` int32 [programs]."""
    program = tl.program_id(0)
    begun = begun_at(IS_STAMPED)
    meeting = tl.load(meetings + program) + 1
    _meet(rooms, meeting, most_polls, RANK, W)
    dtype: tl.constexpr = x.dtype.element_ty
    at = tl.arange(0, SIZE)
    inside = at < D
    if HAS_NORM:
        scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    first = T * RANK // W
    for row in range(first + program, T * (RANK + 1) // W, tl.num_programs(0)):
        place = row * D + at
        place_of_addend = place - first * D if IS_OF_SHARE else place
        kept = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        added = tl.zeros([SIZE], dtype=tl.float32)
        for rank in tl.static_range(W):
            start = tl.load(addends + rank) + skipped
            if IS_ALIGNED:
                start = tl.multiple_of(start, 16)
            source = start.to(tl.pointer_type(dtype)) + place_of_addend
            added += tl.load(source, mask=inside, other=0.0).to(tl.float32)
        # the sum is rounded before it is added, as a separate one is
        made = (kept + added.to(dtype).to(tl.float32)).to(dtype)
        if HAS_NORM:
            tl.store(total + place, made, mask=inside)
            value = made.to(tl.float32)
            value *= tl.rsqrt(tl.sum(value * value, 0) / D + eps)
            if HAS_OFFSET:
                made = (value * (scale + offset)).to(dtype)
            else:  # rounded before it is scaled, as models were trained
                made = (value.to(dtype).to(tl.float32) * scale).to(dtype)
        for step in tl.static_range(W):
            results = tl.multiple_of(tl.load(rooms + (RANK + step) % W) + RESULTS, 16)
            tl.store(results.to(tl.pointer_type(dtype)) + place, made, mask=inside)
    _meet(rooms, meeting + 1, most_polls, RANK, W)
    tl.store(meetings + program, meeting + 1)
    stamp(stamps, begun, IS_STAMPED)


@dataclass(frozen=True)
class Addends:
    """`place`, uint8, takes what this rank adds, [T, D]: from its start on or, where it is a window into the memory of
    two ranks, so that the second one's rows begin at its byte `boundary`. `sources` int64 [W], on the device, are
    where what each rank adds lies for this one to read: all of it or, of windows, the rows of this rank's share."""

    sources: torch.Tensor
    place: torch.Tensor
    boundary: int | None = None

    def of(self, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        row_bytes = width * dtype.itemsize
        start = self.skipped(num_rows, row_bytes, 0)
        return _rows(self.place, start, num_rows, width, dtype)

    def skipped(self, num_rows: int, row_bytes: int, rank: int) -> int:
        """Bytes at a source before what `rank` reads there."""
        if self.boundary is None or rank:
            return 0
        return self.boundary - num_rows // 2 * row_bytes


@dataclass(frozen=True)
class Rooms:
    """Memory of every rank that all map: `addresses` int64 [W], on the device, of `num_bytes` each, zeroed before
    anybody sums: flags, and results of up to `sum_bytes`. `own`, uint8, is this rank's; `meetings` int32
    [NUM_PROGRAMS], zeroed too. A rank waits for another `most_polls` times at most."""

    addresses: torch.Tensor
    meetings: torch.Tensor
    own: torch.Tensor
    added: Addends
    rank: int
    sum_bytes: int
    most_polls: int

    @staticmethod
    def num_bytes(num_ranks: int, sum_bytes: int) -> int:
        return _flag_bytes(num_ranks) + sum_bytes

    @property
    def first_result(self) -> int:
        """Bytes before the results."""
        return _flag_bytes(len(self.addresses))

    def addends(self, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Where a rank puts what it adds, [num_rows, width], before it sums; None where there is too little room."""
        if num_rows * width * dtype.itemsize > self.sum_bytes:
            return None
        return self.added.of(num_rows, width, dtype)

    def results(self, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Where what is made of a sum comes to lie, until the next one."""
        return _rows(self.own, self.first_result, num_rows, width, dtype)


def _rows(
    memory: torch.Tensor, start: int, num_rows: int, width: int, dtype: torch.dtype
) -> torch.Tensor:
    num_bytes = num_rows * width * dtype.itemsize
    return memory[start : start + num_bytes].view(dtype).view(num_rows, width)


def _flag_bytes(num_ranks: int) -> int:
    return 4 * NUM_PROGRAMS * num_ranks


def sharded_sum_add(
    rooms: Rooms, addend: torch.Tensor, x: torch.Tensor, stamps: torch.Tensor | None = None
) -> torch.Tensor:
    """x + the sum over the ranks of their addends [T, D], whole on every rank, of x's rows of this rank's share. When
    it began and ended comes into `stamps`, int64 [2]."""
    return _run(rooms, addend, x, None, None, stamps=stamps).clone()


def sharded_sum_add_norm(
    rooms: Rooms,
    addend: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    stamps: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + the sum over the ranks of their addends [T, D], of which nothing but the rows of this rank's share is
    written, and its RMSNorm, whole, which lies there until the next sum. All call it with the same T and D, in the
    same order. `stamps` as above."""
    total = torch.empty_like(addend)
    return total, _run(rooms, addend, x, weight, total, eps, offset, stamps)


def _run(
    rooms: Rooms,
    addend: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    total: torch.Tensor | None,
    eps: float = 0.0,
    offset: float = 0.0,
    stamps: torch.Tensor | None = None,
) -> torch.Tensor:
    num_rows, width = addend.shape
    assert x.dtype == addend.dtype, "they lie side by side"
    place = rooms.addends(num_rows, width, addend.dtype)
    assert place is not None
    results = rooms.results(num_rows, width, addend.dtype)
    if addend.data_ptr() != place.data_ptr():
        place.copy_(addend)
    size, row_bytes = triton.next_power_of_2(width), width * addend.dtype.itemsize
    sharded_sum_kernel[(NUM_PROGRAMS,)](
        x.contiguous(), x if weight is None else weight, x if total is None else total,
        rooms.addresses, rooms.added.sources, rooms.meetings, x if stamps is None else stamps, num_rows,
        rooms.added.skipped(num_rows, row_bytes, rooms.rank),
        eps, offset, rooms.most_polls,
        RANK=rooms.rank, W=len(rooms.addresses), D=width, SIZE=size,
        IS_OF_SHARE=rooms.added.boundary is not None, IS_ALIGNED=row_bytes % 16 == 0,
        RESULTS=rooms.first_result,
        HAS_NORM=weight is not None, HAS_OFFSET=offset != 0, IS_STAMPED=stamps is not None,
        num_warps=max(1, min(16, size // 512)), debug=True, sanitize_overflow=False,
    )  # fmt: skip
    return results
