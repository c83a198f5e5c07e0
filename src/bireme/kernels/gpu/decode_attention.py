"""Attention of one new token a sequence over a paged cache, split over the context (flash decoding).

Each program reads one KV head's part of a context once, for all query heads that share it; a second
kernel puts the parts together. Shapes: B sequences, H query heads, K KV heads, D head size, S splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bireme.kernels.choice import MULTIPROCESSORS
from bireme.kernels.gpu.attend import attend_block, cache_places
from bireme.kernels.gpu.chain import await_before, chained

_PROGRAMS = 2 * MULTIPROCESSORS  # that a large GPU has at once
_MOST_SPLITS = 16


@triton.jit(do_not_specialize_on_alignment=["slots", "positions", "top", "mass"])
def decode_attention_kernel(
    q, keys, values, table, slots, positions, head_starts, slopes, out, acc, top, mass,
    scale, cap, table_stride,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, G: tl.constexpr,
    N: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    kv, row, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    slot, position = tl.load(slots + row).to(tl.int64), tl.load(positions + row).to(tl.int32)
    stop = position + 1
    first = 0
    if WINDOW > 0:
        first = tl.maximum(0, stop - WINDOW)
    begin = first // N
    per_split = tl.cdiv(tl.cdiv(stop, N) - begin, SPLITS)
    low = (begin + split * per_split) * N
    high = tl.minimum(stop, low + per_split * N)
    own_table = table + slot * table_stride
    place = cache_places(own_table, low, high, N, BLOCK_SIZE)
    d = tl.arange(0, SIZE)
    head = tl.load(head_starts + kv) + tl.arange(0, G)
    is_head = head < tl.load(head_starts + kv + 1)
    slope = tl.zeros([G], dtype=tl.float32)
    if HAS_SLOPES:
        slope = tl.load(slopes + head, mask=is_head, other=0.0)
    # slots, positions and tables are written before a layer begins: the kernel before, which rotates, writes none
    await_before(IS_CHAINED)

    q_at = (row * H + head)[:, None] * D + d[None, :]
    q_mask = is_head[:, None] & (d[None, :] < D)
    query = tl.load(q + q_at, mask=q_mask, other=0.0)

    best = tl.full([G], float("-inf"), dtype=tl.float32)
    total = tl.zeros([G], dtype=tl.float32)
    mixed = tl.zeros([G, SIZE], dtype=tl.float32)
    for at in range(low, high, N):
        n = at + tl.arange(0, N)
        seen = (n < high) & (n >= first)
        kv_at = (place * K + kv)[:, None] * D + d[None, :]
        # looked up a block ahead: else the pipeline's stages would go to the table's, and none to keys and values
        place = cache_places(own_table, at + N, high, N, BLOCK_SIZE)
        best, total, mixed = attend_block(
            (best, total, mixed), query, keys + kv_at, values + kv_at, seen, seen[None, :],
            (position - n)[None, :], slope[:, None], d, scale, cap,
            D, SIZE, HAS_CAP, HAS_SLOPES, True,
        )  # fmt: skip
    if SPLITS == 1:
        mixed = mixed / total[:, None]
        tl.store(out + q_at, mixed.to(out.dtype.element_ty), mask=q_mask)
    else:
        of_head = (row * H + head) * SPLITS + split
        tl.store(top + of_head, best, mask=is_head)
        tl.store(mass + of_head, total, mask=is_head)
        tl.store(acc + of_head[:, None] * D + d[None, :], mixed, mask=q_mask)


@triton.jit(do_not_specialize_on_alignment=["top", "mass"])
def join_splits_kernel(
    acc, top, mass, out,
    D: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    await_before(IS_CHAINED)
    of_head = tl.program_id(0).to(tl.int64)
    split, d = tl.arange(0, SPLITS), tl.arange(0, SIZE)
    best = tl.load(top + of_head * SPLITS + split)
    share = tl.exp2(best - tl.max(best, 0))
    total = tl.sum(share * tl.load(mass + of_head * SPLITS + split), 0)
    at = (of_head * SPLITS + split)[:, None] * D + d[None, :]
    parts = tl.load(acc + at, mask=d[None, :] < D, other=0.0)
    mixed = tl.sum(parts * share[:, None], 0) / total
    tl.store(out + of_head * D + d, mixed.to(out.dtype.element_ty), mask=d < D)


def _most_splits(num_sequences: int, num_kv_heads: int) -> int:
    """With which all programs are there at once; 0 where they are not even with one. The same for all numbers of
    sequences up to a power of two: graphs of those numbers alone have all kernels compiled."""
    most_sequences = int(triton.next_power_of_2(num_sequences))
    return _PROGRAMS // max(1, most_sequences * num_kv_heads)


def num_splits(num_sequences: int, num_kv_heads: int) -> int:
    """A power of two, the next one, that gives every multiprocessor work, and does not depend on the contexts: a graph
    that was captured keeps it."""
    wanted = _most_splits(num_sequences, num_kv_heads)
    return min(_MOST_SPLITS, 1 << max(0, wanted - 1).bit_length())


def block_positions(num_sequences: int, num_kv_heads: int, head_dim: int) -> int:
    """Of a context, that a program attends to at a time: smaller blocks begin sooner, larger ones take less in all,
    where programs follow one another."""
    return 32 if head_dim > 128 or _most_splits(num_sequences, num_kv_heads) else 64


def decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    block_size: int,
    slots: torch.Tensor,
    positions: torch.Tensor,
    head_starts: torch.Tensor,
    num_shared: int,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [B, H, D] -> [B, H, D], of tokens at `positions` [B] of `slots` [B], whose own keys and values are
    in the cache [N, K, D] already; `table` [slots, blocks] says where.

    Query heads [head_starts[k], head_starts[k + 1]) read KV head k, at most `num_shared` of them.
    """
    num_sequences, num_heads, head_dim = q.shape
    num_kv_heads = keys.shape[1]
    splits = num_splits(num_sequences, num_kv_heads)
    block = block_positions(num_sequences, num_kv_heads, head_dim)
    out = torch.empty_like(q)
    of_heads = num_sequences * num_heads * splits
    acc = q.new_empty(of_heads * head_dim if splits > 1 else 1, dtype=torch.float32)
    top, mass = q.new_empty(2, of_heads if splits > 1 else 1, dtype=torch.float32).unbind(0)
    size = triton.next_power_of_2(max(16, head_dim))
    decode_attention_kernel[(num_kv_heads, num_sequences, splits)](
        q, keys, values, table, slots, positions, head_starts,
        slopes if slopes is not None else q, out, acc, top, mass,
        scale, cap or 0.0, table.stride(0),
        H=num_heads, K=num_kv_heads, D=head_dim, SIZE=size,
        G=triton.next_power_of_2(max(16, num_shared)), N=block,
        BLOCK_SIZE=block_size, SPLITS=splits, WINDOW=window or 0,
        HAS_CAP=cap is not None, HAS_SLOPES=slopes is not None, num_warps=4,
        num_stages=3 if block * size <= 32 * 128 else 2,
        **chained(q),
    )  # fmt: skip
    if splits > 1:
        join_splits_kernel[(num_sequences * num_heads,)](
            acc, top, mass, out, D=head_dim, SIZE=size, SPLITS=splits, num_warps=4,
            **chained(q),
        )  # fmt: skip
    return out
