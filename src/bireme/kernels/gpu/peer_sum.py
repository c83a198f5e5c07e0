"""Sums of rows over GPUs that map each other's memory, with the residual's addition and RMSNorm behind it.

Every rank writes its rows into every other's memory, each 12 bytes beside the number of the sum, in one store of
16 bytes, which NVLink does not part: where the number has come, so have they (as in NCCL's protocols LL and LL128, with
stores of 8 and 128 bytes). Nobody waits for more than the rows themselves, and nothing is to be cleared. A row's number
lies in memory and is counted up by each sum, so that eager steps and replays of any graphs may follow one another; its
parity chooses one of two places, and a rank is in its next sum only after it has read all of this one.
Shapes: T rows, D elements, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from bireme.kernels.gpu.chain import await_before, chained
from bireme.kernels.gpu.parts import summed
from bireme.kernels.gpu.stamp import begun_at, stamp


@triton.jit
def _halves(word, dtype: tl.constexpr):
    """The two elements of 2 bytes in an int32, as float32."""
    low = word.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    high = (word >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _word(low, high, dtype: tl.constexpr):
    low = low.to(dtype).to(tl.int16, bitcast=True).to(tl.int32)
    high = high.to(dtype).to(tl.int16, bitcast=True).to(tl.int32)
    return (low & 0xFFFF) | (high << 16)


@triton.jit
def _hear(source, number, told):
    """What lies there, and whether all of it is of this sum."""
    heard = tl.load(source, mask=told, other=0, volatile=True)
    is_old = told & (tl.arange(0, 4) == 3)[None, :] & (heard != number)
    return heard, tl.max(tl.max(is_old.to(tl.int32), 1), 0) == 0


@triton.jit
def peer_sum_kernel(
    addend, x, weight, total, normed, inboxes, numbers, stamps, apart, eps, offset, most_polls,
    RANK: tl.constexpr, W: tl.constexpr, WORDS: tl.constexpr, SIZE: tl.constexpr,
    PLACE: tl.constexpr, DTYPE: tl.constexpr, HAS_X: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_OFFSET: tl.constexpr, IS_CHAINED: tl.constexpr, PARTS: tl.constexpr, IS_PARTED: tl.constexpr,
    IS_STAMPED: tl.constexpr,
):  # fmt: skip
    """PARTS of `addend`, float32, `apart` elements from one another; 0: it is whole. `inboxes` int64 [W] addresses of
    int32 [rows, 2, W, PLACE]; `numbers` int32 [rows]. All rows are read as int32 words, three beside a fourth, which is
    the number where ranks tell one another. IS_PARTED: a store of 16 bytes is no single one."""
    row = tl.program_id(0).to(tl.int64)
    group, part = tl.arange(0, SIZE)[:, None], tl.arange(0, 4)[None, :]
    at = group * 3 + part
    inside = (part < 3) & (at < WORDS)
    told = (group * 3 < WORDS) & (part < 4)
    await_before(IS_CHAINED)
    begun = begun_at(IS_STAMPED)
    number = tl.load(numbers + row) + 1
    place = (row * 2 + (number & 1)) * W
    if PARTS > 0:
        first = addend + 2 * (row * WORDS + at)
        one = summed(first, inside, apart, PARTS, DTYPE)
        own = _word(one, summed(first + 1, inside, apart, PARTS, DTYPE), DTYPE)
    else:
        own = tl.load(addend + row * WORDS + at, mask=inside, other=0)
    for step in tl.static_range(1, W):
        peer = (RANK + step) % W
        inbox = tl.load(inboxes + peer).to(tl.pointer_type(tl.int32))
        to = tl.multiple_of(inbox + (place + RANK) * PLACE, 16) + group * 4 + part
        tl.store(to, tl.where(part == 3, number, own), mask=told, cache_modifier=".wt")
    low, high = tl.zeros([SIZE, 4], dtype=tl.float32), tl.zeros([SIZE, 4], dtype=tl.float32)
    if HAS_X:
        kept = tl.load(x + row * WORDS + at, mask=inside, other=0)
    if HAS_NORM:
        scale = tl.load(weight + at, mask=inside, other=0)
    mine = tl.load(inboxes + RANK).to(tl.pointer_type(tl.int32))
    for rank in tl.static_range(W):  # in this order on every rank: all get the same
        word = own
        if rank != RANK:
            source = tl.multiple_of(mine + (place + rank) * PLACE, 16) + group * 4 + part
            heard, is_there = _hear(source, number, told)
            polls = 0
            while (not is_there) & (polls < most_polls):
                heard, is_there = _hear(source, number, told)
                polls += 1
            tl.device_assert(is_there, "a rank's part of a sum did not come in time")
            if IS_PARTED:
                heard, is_there = _hear(source, number, told)
            word = tl.where(inside, heard, 0)
        if tl.float32 == DTYPE:
            low += word.to(tl.float32, bitcast=True)
        else:
            one, other = _halves(word, DTYPE)
            low += one
            high += other
    if HAS_X:
        # the sum is rounded before it is added, as a separate one is
        if tl.float32 == DTYPE:
            low += kept.to(tl.float32, bitcast=True)
        else:
            one, other = _halves(kept, DTYPE)
            low = low.to(DTYPE).to(tl.float32) + one
            high = high.to(DTYPE).to(tl.float32) + other
    if tl.float32 == DTYPE:
        tl.store(total + row * WORDS + at, low.to(tl.int32, bitcast=True), mask=inside)
    else:
        low, high = low.to(DTYPE).to(tl.float32), high.to(DTYPE).to(tl.float32)
        tl.store(total + row * WORDS + at, _word(low, high, DTYPE), mask=inside)
    if HAS_NORM:
        if tl.float32 == DTYPE:
            mean = tl.sum(tl.sum(low * low, 1), 0) / WORDS
            factor = scale.to(tl.float32, bitcast=True)
            result = low * tl.rsqrt(mean + eps) * (factor + offset)
            tl.store(normed + row * WORDS + at, result.to(tl.int32, bitcast=True), mask=inside)
        else:
            mean = tl.sum(tl.sum(low * low + high * high, 1), 0) / (2 * WORDS)
            shrink = tl.rsqrt(mean + eps)
            low, high = low * shrink, high * shrink
            one, other = _halves(scale, DTYPE)
            if HAS_OFFSET:
                low, high = low * (one + offset), high * (other + offset)
            else:  # rounded before it is scaled, as models were trained
                low = low.to(DTYPE).to(tl.float32) * one
                high = high.to(DTYPE).to(tl.float32) * other
            tl.store(normed + row * WORDS + at, _word(low, high, DTYPE), mask=inside)
    tl.store(numbers + row, number)
    stamp(stamps, begun, IS_STAMPED)


_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _num_groups(num_words: int) -> int:
    """Of three words that are told together."""
    return -(-num_words // 3)


@dataclass(frozen=True)
class Inboxes:
    """Where the ranks of a group write to one another: `addresses` int64 [W], on the device, of memory of
    `num_bytes` each, zeroed before anybody sums; `numbers` int32 [rows], zeroed, this rank's own. A rank waits for
    another `most_polls` times at most."""

    addresses: torch.Tensor
    numbers: torch.Tensor
    rank: int
    num_words: int
    most_polls: int

    @staticmethod
    def num_bytes(num_rows: int, num_ranks: int, num_words: int) -> int:
        return num_rows * 2 * num_ranks * 16 * _num_groups(num_words)

    def suits(self, x: torch.Tensor) -> bool:
        """Whether x [T, D] can be summed through them."""
        if x.dim() != 2 or x.dtype not in _DTYPES or not x.is_contiguous():
            return False
        row_bytes = x.shape[1] * x.element_size()
        return (
            0 < len(x) <= len(self.numbers) and row_bytes % 4 == 0 < row_bytes <= 4 * self.num_words
        )


def peer_sum(
    inboxes: Inboxes, addend: torch.Tensor, stamps: torch.Tensor | None = None
) -> torch.Tensor:
    """Over the ranks, of their addends [T, D], in place; all call it with the same T and D, in the same order. When it
    began and ended comes into `stamps`, int64 [2]."""
    _run(inboxes, addend, None, None, addend, None, stamps=stamps)
    return addend


def peer_sum_add_norm(
    inboxes: Inboxes,
    addend: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    stamps: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + the sum over the ranks of their addends [T, D], and its RMSNorm; all of one dtype. This rank's may be in
    parts, float32 [P, T, D], where that has 16 bits. `stamps` as above."""
    assert x.dtype == weight.dtype, "rows are read as words"
    assert addend.dim() == 3 or addend.dtype == x.dtype
    total, normed = torch.empty_like(x), torch.empty_like(x)
    _run(inboxes, addend, x.contiguous(), weight, total, normed, eps, offset, stamps)
    return total, normed


def _run(
    inboxes: Inboxes,
    addend: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    total: torch.Tensor,
    normed: torch.Tensor | None,
    eps: float = 0.0,
    offset: float = 0.0,
    stamps: torch.Tensor | None = None,
) -> None:
    parts = len(addend) if addend.dim() == 3 else 0
    words = total.view(torch.int32)
    others = (words if it is None else it.view(torch.int32) for it in (x, weight, total, normed))
    num_words = words.shape[1]
    size = max(32, triton.next_power_of_2(_num_groups(num_words)))
    peer_sum_kernel[(len(total),)](
        addend if parts else addend.view(torch.int32), *others, inboxes.addresses, inboxes.numbers,
        words if stamps is None else stamps, total.numel(), eps, offset, inboxes.most_polls,
        RANK=inboxes.rank, W=len(inboxes.addresses), WORDS=num_words, SIZE=size,
        PLACE=4 * _num_groups(inboxes.num_words), DTYPE=_DTYPES[total.dtype], HAS_X=x is not None,
        HAS_NORM=weight is not None, HAS_OFFSET=offset != 0, PARTS=parts, IS_PARTED=not total.is_cuda,
        IS_STAMPED=stamps is not None,
        # a thread has the 16 bytes of one store whole, so that there are no more threads than stores; wide
        # rows take less by more of them (8,192 in 16 bits, two H200s)
        num_warps=min(16 if size > 1024 else 8, size // 32), debug=True, sanitize_overflow=False,
        **chained(total),
    )  # fmt: skip
