"""Sums of rows over GPUs that map each other's memory, with the residual's addition and RMSNorm behind it.

Every rank writes its rows into every other's memory, each 4 bytes beside the number of the sum, in one store of
8 bytes: where the number has come, so has the row (NCCL's LL protocol). Nobody waits for more than the rows
themselves, and nothing is to be cleared. A row's number lies in memory and is counted up by each sum, so that
eager steps and replays of any graphs may follow one another; its parity chooses one of two places, and a rank is
in its next sum only after it has read all of this one.
Shapes: T rows, D elements, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from bireme.kernels.gpu.chain import await_before, chained


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
def peer_sum_kernel(
    addend, x, weight, total, normed, inboxes, numbers, eps, offset, most_polls,
    RANK: tl.constexpr, W: tl.constexpr, WORDS: tl.constexpr, SIZE: tl.constexpr,
    PLACE: tl.constexpr, DTYPE: tl.constexpr, HAS_X: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_OFFSET: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """`inboxes` int64 [W] addresses of int64 [rows, 2, W, PLACE]; `numbers` int32 [rows]. All rows are read as
    int32 words."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    inside = at < WORDS
    await_before(IS_CHAINED)
    number = tl.load(numbers + row) + 1
    place = (row * 2 + (number & 1)) * W
    own = tl.load(addend + row * WORDS + at, mask=inside, other=0)
    told = (number.to(tl.int64) << 32) | (own.to(tl.int64) & 0xFFFFFFFF)
    for step in tl.static_range(1, W):
        peer = (RANK + step) % W
        inbox = tl.load(inboxes + peer).to(tl.pointer_type(tl.int64))
        to = inbox + (place + RANK) * PLACE + at
        tl.store(to, told, mask=inside, cache_modifier=".wt")
    low, high = tl.zeros([SIZE], dtype=tl.float32), tl.zeros([SIZE], dtype=tl.float32)
    if HAS_X:
        kept = tl.load(x + row * WORDS + at, mask=inside, other=0)
    if HAS_NORM:
        scale = tl.load(weight + at, mask=inside, other=0)
    mine = tl.load(inboxes + RANK).to(tl.pointer_type(tl.int64))
    for rank in tl.static_range(W):  # in this order on every rank: all get the same
        word = own
        if rank != RANK:
            source = mine + (place + rank) * PLACE + at
            heard = tl.load(source, mask=inside, other=0, volatile=True)
            missing = tl.max(tl.where(inside & ((heard >> 32).to(tl.int32) != number), 1, 0), 0)
            polls = 0
            while (missing > 0) & (polls < most_polls):
                heard = tl.load(source, mask=inside, other=0, volatile=True)
                missing = tl.max(tl.where(inside & ((heard >> 32).to(tl.int32) != number), 1, 0), 0)
                polls += 1
            tl.device_assert(missing == 0, "a rank's part of a sum did not come in time")
            word = heard.to(tl.int32)
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
            mean = tl.sum(low * low, 0) / WORDS
            factor = scale.to(tl.float32, bitcast=True)
            result = low * tl.rsqrt(mean + eps) * (factor + offset)
            tl.store(normed + row * WORDS + at, result.to(tl.int32, bitcast=True), mask=inside)
        else:
            mean = tl.sum(low * low + high * high, 0) / (2 * WORDS)
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


_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


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
        return num_rows * 2 * num_ranks * num_words * 8

    def suits(self, x: torch.Tensor) -> bool:
        """Whether x [T, D] can be summed through them."""
        if x.dim() != 2 or x.dtype not in _DTYPES or not x.is_contiguous():
            return False
        row_bytes = x.shape[1] * x.element_size()
        return (
            0 < len(x) <= len(self.numbers) and row_bytes % 4 == 0 < row_bytes <= 4 * self.num_words
        )


def peer_sum(inboxes: Inboxes, addend: torch.Tensor) -> torch.Tensor:
    """Over the ranks, of their addends [T, D], in place; all call it with the same T and D, in the same order."""
    _run(inboxes, addend, None, None, addend, None)
    return addend


def peer_sum_add_norm(
    inboxes: Inboxes,
    addend: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + the sum over the ranks of their addends [T, D], and its RMSNorm; all of one dtype."""
    assert x.dtype == weight.dtype == addend.dtype, "rows are read as words"
    total, normed = torch.empty_like(addend), torch.empty_like(addend)
    _run(inboxes, addend, x.contiguous(), weight, total, normed, eps, offset)
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
) -> None:
    own = addend.view(torch.int32)
    others = (own if it is None else it.view(torch.int32) for it in (x, weight, total, normed))
    num_words = own.shape[1]
    size = triton.next_power_of_2(num_words)
    peer_sum_kernel[(len(addend),)](
        own, *others, inboxes.addresses, inboxes.numbers,
        eps, offset, inboxes.most_polls,
        RANK=inboxes.rank, W=len(inboxes.addresses), WORDS=num_words, SIZE=size,
        PLACE=inboxes.num_words, DTYPE=_DTYPES[addend.dtype], HAS_X=x is not None,
        HAS_NORM=weight is not None, HAS_OFFSET=offset != 0,
        num_warps=max(1, min(16, size // 256)), debug=True, sanitize_overflow=False,
        **chained(addend),
    )  # fmt: skip
