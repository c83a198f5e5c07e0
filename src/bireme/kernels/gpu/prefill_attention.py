"""Attention of runs of new tokens over a paged cache: a prompt's chunk against all that came before it.

Each program takes a tile of one run's queries for one head, and goes through the context once with running
maxima and sums (flash attention). Shapes: T tokens, H query heads, K KV heads, D head size, R runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bireme.kernels.choice import MULTIPROCESSORS, is_hopper
from bireme.kernels.gpu.attend import (
    attend_block,
    attend_described,
    cache_places,
    parts_of,
    store_part,
)
from bireme.kernels.gpu.descriptors import can_be_described, described
from bireme.kernels.query_tiles import TILE, Tiles

_PROGRAMS = 4 * MULTIPROCESSORS  # that a large GPU has at once, or a few more
_NARROW = 80  # the largest head size of which a multiprocessor's shared memory holds three programs
_REGISTERS = 168  # of a thread, at most, of three programs of 128 threads that share 65,536


@triton.jit
def _attend_cached(
    state, query, at_m, begin, end, keys, values, table, kv, slope, scale, cap,
    K: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, REST: tl.constexpr, N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Positions [begin, end) of the cache, `begin` a multiple of N; unless IS_MASKED `end` too, and all queries see
    all of them."""
    for at in range(begin, end, N):
        n = at + tl.arange(0, N)
        distance = at_m[:, None] - n[None, :]
        seen = (distance >= 0) & (n < end)[None, :]
        if WINDOW > 0:
            seen &= distance < WINDOW
        place = cache_places(table, at, end, N, BLOCK_SIZE)
        state = attend_block(
            state, query, keys, values, (place * K + kv) * D, n < end, seen, distance, slope, scale,
            cap, D, SIZE, REST, HAS_CAP, HAS_SLOPES, IS_MASKED,
        )  # fmt: skip
    return state


@triton.jit
def _attend_own(
    state, query, at_m, begin, end, qkv, firsts, rests, row_stride, row, position, kv, slope,
    scale, cap,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, REST: tl.constexpr,
    N: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr, IS_MASKED: tl.constexpr,
    IS_DESCRIBED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same of the run's own rows of qkv, of which `row` is that of `position`. Described ones are fetched in
    whole blocks, which are seen by all queries: not IS_MASKED."""
    for at in tl.range(begin, end, N, num_stages=STAGES):
        n = at + tl.arange(0, N)
        distance = at_m[:, None] - n[None, :]
        if IS_DESCRIBED:
            state = attend_described(
                state, query, firsts, rests, (row - position + at).to(tl.int32), H + kv,
                H + K + kv, distance, slope, scale, cap, N, SIZE, REST, HAS_CAP, HAS_SLOPES,
            )  # fmt: skip
        else:
            seen = (distance >= 0) & (n < end)[None, :]
            own = (row - position + n) * row_stride + (H + kv) * D
            state = attend_block(
                state, query, qkv, qkv + K * D, own, n < end, seen, distance, slope, scale, cap,
                D, SIZE, REST, HAS_CAP, HAS_SLOPES, IS_MASKED,
            )  # fmt: skip
    return state


@triton.jit
def _attend_tile(
    row, position, count, beside, head, q, keys, values, qkv, firsts, rests, table, slots,
    head_map, slopes, out, scale, cap, table_stride, row_stride,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, REST: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_ROWS: tl.constexpr,
    IS_DESCRIBED: tl.constexpr, OWN_STAGES: tl.constexpr,
):  # fmt: skip
    """Rows [row, row + count) of a step, the first of them at `position` of a run, whose rows lie side by side from
    position `beside` on."""
    slot = tl.load(slots + row).to(tl.int64)
    kv = tl.load(head_map + head)

    m = tl.arange(0, M)
    offsets = ((row + m) * H + head) * D
    query = parts_of(q, offsets, m < count, D, SIZE, REST, True)
    at_m = position + m
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(slopes + head)

    best = tl.full([M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)
    mixed = tl.zeros([M, SIZE], dtype=tl.float32)
    mixed_rest = tl.zeros([M, REST], dtype=tl.float32) if REST else total  # not used then
    own_table = table + slot * table_stride
    stop, low, cached = position + count, 0, position + count
    if HAS_ROWS:
        cached = beside
    whole = tl.minimum(cached, position) // N * N  # blocks before it are seen by all rows
    if WINDOW > 0:
        low = tl.maximum(0, position - WINDOW + 1) // N * N
        whole = low
    state = (best, total, mixed, mixed_rest)
    if WINDOW == 0:
        state = _attend_cached(
            state, query, at_m, low, whole, keys, values, own_table, kv, slope, scale, cap,
            K, D, SIZE, REST, N, BLOCK_SIZE, WINDOW, HAS_CAP, HAS_SLOPES, False,
        )  # fmt: skip
    state = _attend_cached(
        state, query, at_m, whole, cached, keys, values, own_table, kv, slope, scale, cap,
        K, D, SIZE, REST, N, BLOCK_SIZE, WINDOW, HAS_CAP, HAS_SLOPES, True,
    )  # fmt: skip
    if HAS_ROWS:
        before = beside + tl.maximum(0, position - beside) // N * N
        state = _attend_own(
            state, query, at_m, beside, before, qkv, firsts, rests, row_stride, row, position, kv,
            slope, scale, cap,
            H, K, D, SIZE, REST, N, HAS_CAP, HAS_SLOPES, False, IS_DESCRIBED, OWN_STAGES,
        )  # fmt: skip
        state = _attend_own(
            state, query, at_m, before, stop, qkv, firsts, rests, row_stride, row, position, kv,
            slope, scale, cap,
            H, K, D, SIZE, REST, N, HAS_CAP, HAS_SLOPES, True, False,
            1 if IS_DESCRIBED else (OWN_STAGES + 1) // 2,  # a block or two, as was quickest
        )  # fmt: skip
    best, total, mixed, mixed_rest = state
    total = tl.where(total == 0.0, 1.0, total)[:, None]  # of rows behind the last
    store_part(out, offsets, m < count, mixed / total, 0, SIZE, D)
    if REST:
        store_part(out, offsets, m < count, mixed_rest / total, SIZE, REST, D)


@triton.jit(do_not_specialize=["num_tiles"])
def prefill_attention_kernel(
    q, keys, values, qkv, firsts, rests, table, slots, tiles, head_map, slopes, out, num_tiles,
    scale, cap, table_stride, row_stride,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, REST: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_ROWS: tl.constexpr,
    IS_DESCRIBED: tl.constexpr, OWN_STAGES: tl.constexpr,
):  # fmt: skip
    """Programs of a head take its tiles in turn, up to the first that is of no run. `firsts` and
    `rests`: the two parts of qkv's heads, described."""
    tile, head = tl.program_id(1), tl.program_id(0)
    count = tl.load(tiles + tile * 4 + 2)
    while count > 0:
        row = tl.load(tiles + tile * 4).to(tl.int64)
        position, beside = tl.load(tiles + tile * 4 + 1), tl.load(tiles + tile * 4 + 3)
        _attend_tile(
            row, position, count, beside, head, q, keys, values, qkv, firsts, rests, table, slots,
            head_map, slopes, out, scale, cap, table_stride, row_stride,
            H, K, D, SIZE, REST, M, N, BLOCK_SIZE, WINDOW, HAS_CAP, HAS_SLOPES, HAS_ROWS,
            IS_DESCRIBED, OWN_STAGES,
        )  # fmt: skip
        tile += tl.num_programs(1)
        count = tl.load(tiles + tile * 4 + 2, mask=tile < num_tiles, other=0)


def _head_parts(head_dim: int) -> tuple[int, int]:
    """Powers of two that hold it, the second 0 where one is as small: of 80 64 and 16, and not 128."""
    whole = triton.next_power_of_2(max(16, head_dim))
    size = whole // 2
    rest = triton.next_power_of_2(max(16, head_dim - size))
    return (size, rest) if size + rest < whole else (whole, 0)


def prefill_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    block_size: int,
    slots: torch.Tensor,
    tiles: Tiles,
    head_map: torch.Tensor,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    slopes: torch.Tensor | None = None,
    qkv: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [T, H, D] -> [T, H, D], of tokens of `slots` [T], whose own keys and values are in the cache
    [N, K, D] already; `table` [slots, blocks] says where. Query head h reads KV head `head_map[h]`. Rows that are
    in no tile are zeros. Where they lie in rows of qkv [T, (H + 2 K) * D] too, all of a run side by side, they are read
    there; not with a window."""
    num_heads, head_dim = q.shape[1:]
    out = torch.zeros_like(q) if tiles.has_other_rows else torch.empty_like(q)
    size, rest = _head_parts(head_dim)
    is_wide = q.dtype == torch.float32 or size + rest > 128
    num_tiles = len(tiles.on_device)
    columns = max(-(-len(q) // TILE), _PROGRAMS // num_heads)  # many runs may be short
    has_rows = qkv is not None and not window
    rows = qkv if qkv is not None else q
    places = 32 if is_wide else 64
    # heads of qkv, one after another [H + 2 K, T, D]
    of_heads = rows.unflatten(1, (-1, head_dim)).transpose(0, 1) if has_rows else rows
    is_described = has_rows and not is_wide and can_be_described(of_heads)
    firsts = described(of_heads, [1, places, size]) if is_described else rows
    rests = described(of_heads, [1, places, rest]) if is_described and rest else rows
    prefill_attention_kernel[(num_heads, min(num_tiles, columns))](
        q, keys, values, rows, firsts, rests, table, slots, tiles.on_device, head_map,
        slopes if slopes is not None else q, out, num_tiles, scale, cap or 0.0, table.stride(0),
        rows.stride(0),
        H=num_heads, K=keys.shape[1], D=head_dim, SIZE=size, REST=rest, M=TILE, N=places,
        BLOCK_SIZE=block_size, WINDOW=window or 0, HAS_CAP=cap is not None,
        HAS_SLOPES=slopes is not None, HAS_ROWS=has_rows, IS_DESCRIBED=is_described,
        # rows that lie side by side are fetched further ahead: their addresses are worked out at once
        OWN_STAGES=1 if is_wide else 3, num_warps=4, num_stages=1 if is_wide else 2,
        maxnreg=_REGISTERS if is_hopper(q.device) and not is_wide and head_dim <= _NARROW else None,
    )  # fmt: skip
    return out
