"""What decode and prefill attention share: one more block of a context, with running maxima and sums (flash
attention). Shapes: M queries, N places, D head size, held in parts of SIZE and REST, powers of two; where REST is 0, in
one, and whatever stands for the other is not used."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


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
def _part(
    x, offsets, is_there, BEGIN: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, IS_MASKED: tl.constexpr
):  # fmt: skip
    d = BEGIN + tl.arange(0, SIZE)
    at = x + (offsets[:, None] + d[None, :])
    if IS_MASKED:
        return tl.load(at, mask=is_there[:, None] & (d < D)[None, :], other=0.0)
    if BEGIN + SIZE > D:
        return tl.load(at, mask=(d < D)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def parts_of(
    x, offsets, is_there, D: tl.constexpr, SIZE: tl.constexpr, REST: tl.constexpr, IS_MASKED: tl.constexpr
):  # fmt: skip
    """[N, SIZE] and [N, REST] of the D elements at each of `offsets` [N] of x, and 0 beyond. Where IS_MASKED, those
    that `is_there` [N] tells alone hold anything."""
    part = _part(x, offsets, is_there, 0, SIZE, D, IS_MASKED)
    return part, _part(x, offsets, is_there, SIZE, REST, D, IS_MASKED) if REST else part


@triton.jit
def store_part(
    x, offsets, is_there, part, BEGIN: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """`part` [N, SIZE], from BEGIN on, of the D elements at each of `offsets` [N] of x, of those that are there."""
    d = BEGIN + tl.arange(0, SIZE)
    mask = is_there[:, None] & (d < D)[None, :]
    tl.store(x + (offsets[:, None] + d[None, :]), part.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _described_parts(
    firsts, rests, head, row, N: tl.constexpr, SIZE: tl.constexpr, REST: tl.constexpr
):  # fmt: skip
    part = firsts.load([head, row, 0]).reshape(N, SIZE)
    return part, rests.load([head, row, SIZE]).reshape(N, REST) if REST else part


@triton.jit
def _weigh(
    state, query, k, seen, distance, slope, scale, cap,
    HAS_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr, IS_MASKED: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Weights [M, N] of places with keys `k`, and the state that has all of them but their values. `seen` is for
    IS_MASKED alone."""
    best, total, mixed, mixed_rest = state
    score = tl.dot(query[0], tl.trans(k[0]), input_precision="ieee")
    if REST:
        score = tl.dot(query[1], tl.trans(k[1]), score, input_precision="ieee")
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
    if REST:
        mixed_rest = mixed_rest * shrink[:, None]
    return p, (higher, total * shrink + tl.sum(p, 1), mixed * shrink[:, None], mixed_rest)


@triton.jit
def _mix(p, v, state, REST: tl.constexpr):
    best, total, mixed, mixed_rest = state
    p = p.to(v[0].dtype)
    mixed = tl.dot(p, v[0], mixed, input_precision="ieee")
    if REST:
        mixed_rest = tl.dot(p, v[1], mixed_rest, input_precision="ieee")
    return best, total, mixed, mixed_rest


@triton.jit
def attend_block(
    state, query, keys, values, offsets, is_there, seen, distance, slope, scale, cap,
    D: tl.constexpr, SIZE: tl.constexpr, REST: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """`state` is (largest score [M], sum of weights [M], weighted values [M, SIZE] and [M, REST]) so far, scores times
    log2(e); `query` [M, SIZE] and [M, REST]. Keys and values lie at `offsets` [N] of both; those that
    `is_there` [N] tells alone hold anything. Unless IS_MASKED all are there, and seen by all queries."""
    k = parts_of(keys, offsets, is_there, D, SIZE, REST, IS_MASKED)
    p, state = _weigh(
        state, query, k, seen, distance, slope, scale, cap, HAS_CAP, HAS_SLOPES, IS_MASKED, REST
    )
    return _mix(p, parts_of(values, offsets, is_there, D, SIZE, REST, IS_MASKED), state, REST)


@triton.jit
def attend_described(
    state, query, firsts, rests, row, key_head, value_head, distance, slope, scale, cap,
    N: tl.constexpr, SIZE: tl.constexpr, REST: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
):  # fmt: skip
    """The same of keys and values that lie in described parts of heads from `row` on, seen by all queries."""
    k = _described_parts(firsts, rests, key_head, row, N, SIZE, REST)
    p, state = _weigh(
        state, query, k, None, distance, slope, scale, cap, HAS_CAP, HAS_SLOPES, False, REST
    )
    return _mix(p, _described_parts(firsts, rests, value_head, row, N, SIZE, REST), state, REST)
