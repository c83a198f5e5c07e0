"""What decode and prefill attention share: one more block of a context, with running maxima and sums (flash
attention). Shapes: M queries, N places, D head size."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(at, mask, IS_MASKED: tl.constexpr):
    return tl.load(at, mask=mask, other=0.0) if IS_MASKED else tl.load(at)


@triton.jit
def cache_places(table, start, stop, N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """int64 [N], where positions from `start` on, a multiple of N, of a sequence of `stop` lie; beyond, any place."""
    n = start + tl.arange(0, N)
    if BLOCK_SIZE % N == 0:  # all in one block, whose address is worked out once
        block = tl.load(table + start // BLOCK_SIZE, mask=start < stop, other=0)
    else:
        block = tl.load(table + n // BLOCK_SIZE, mask=n < stop, other=0)
    return block.to(tl.int64) * BLOCK_SIZE + n % BLOCK_SIZE


@triton.jit
def _weigh(
    state, query, k, seen, distance, slope, scale, cap,
    HAS_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Weights [M, N] of places with keys `k` [N, SIZE], and the state that has all of them but their values. `seen` is
    for IS_MASKED alone."""
    best, total, mixed = state
    score = tl.dot(query, tl.trans(k), input_precision="ieee")
    if HAS_CAP:  # cap * tanh(score / cap)
        score = cap * (1 - 2 / (tl.exp(2 * score * scale / cap) + 1))
        scale = 1.0
    if HAS_SLOPES:
        score = score * scale - slope * distance.to(tl.float32)
        scale = 1.0
    score = score * (scale * LOG2E)
    if IS_MASKED:
        score = tl.where(seen, score, float("-inf"))
    higher = tl.maximum(best, tl.max(score, 1))
    higher_or_0 = higher
    if IS_MASKED:  # where nothing is seen yet
        higher_or_0 = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(score - higher_or_0[:, None])
    shrink = tl.exp2(best - higher_or_0)
    return p, (higher, total * shrink + tl.sum(p, 1), mixed * shrink[:, None])


@triton.jit
def _mix(p, v, state):
    best, total, mixed = state
    return best, total, tl.dot(p.to(v.dtype), v, mixed, input_precision="ieee")


@triton.jit
def attend_block(
    state, query, keys, values, is_there, seen, distance, slope, d, scale, cap,
    D: tl.constexpr, SIZE: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr,
    IS_MASKED: tl.constexpr,
):  # fmt: skip
    """`state` is (largest score [M], sum of weights [M], weighted values [M, SIZE]) so far, scores times log2(e);
    `keys` and `values` [N, SIZE] are addresses, those of rows `is_there` [N] alone hold anything. Unless IS_MASKED all
    are there, and seen by all queries."""
    mask = (d < D)[None, :]
    if IS_MASKED:
        mask &= is_there[:, None]
    k = _load(keys, mask, IS_MASKED or SIZE != D)
    p, state = _weigh(
        state, query, k, seen, distance, slope, scale, cap, HAS_CAP, HAS_SLOPES, IS_MASKED
    )
    return _mix(p, _load(values, mask, IS_MASKED or SIZE != D), state)


@triton.jit
def attend_described(
    state, query, rows, first, key_column, value_column, distance, slope, scale, cap,
    HAS_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr,
):  # fmt: skip
    """The same of keys and values that lie in described rows from `first` on, seen by all queries."""
    k = rows.load([first, key_column])
    p, state = _weigh(
        state, query, k, None, distance, slope, scale, cap, HAS_CAP, HAS_SLOPES, False
    )
    return _mix(p, rows.load([first, value_column]), state)
