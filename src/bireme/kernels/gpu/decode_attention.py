"""Attention of one new token a sequence over a paged cache, split over the context (flash decoding).

Each program reads one KV head's split of a context once, for all query heads that share it. Where most contexts are
split, a second kernel joins the splits; where few are, whichever program of a context ends last does.
Shapes: B sequences, H query heads, K KV heads, D head size, W splits of contexts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bireme.kernels.context_splits import ContextSplits
from bireme.kernels.gpu.attend import attend_block, cache_places
from bireme.kernels.gpu.chain import await_before, chained

_REGISTERS = 128  # of a thread, at most: told that there are, the compiler fetches more ahead
_FETCHED_AT_ONCE = 2  # splits, by a context's last program; contexts of one length have few
_SPLITS_AT_ONCE = 32  # that a program joins: by 64 few splits take 0.7 us longer (H200)


@triton.jit(
    do_not_specialize_on_alignment=["items", "arrivals", "slots", "positions", "top", "mass"]
)
def decode_attention_kernel(
    q, keys, values, table, items, arrivals, slots, positions, head_starts, slopes, out, acc, top, mass,
    scale, cap, table_stride,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, G: tl.constexpr,
    N: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr, JOINS_ITSELF: tl.constexpr, AHEAD: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):  # fmt: skip
    kv, item = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, split = tl.load(items + 3 * item).to(tl.int64), tl.load(items + 3 * item + 1)
    splits = tl.load(items + 3 * item + 2)
    if splits == 0:
        return  # before what is launched before is over: that is awaited by those of each row's splits
    slot, position = tl.load(slots + row).to(tl.int64), tl.load(positions + row).to(tl.int32)
    stop = position + 1
    first = 0
    if WINDOW > 0:
        first = tl.maximum(0, stop - WINDOW)
    begin = first // N
    per_split = tl.cdiv(tl.cdiv(stop, N) - begin, splits)
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
    # what is read so far is written before a layer begins: the kernel before, which rotates, writes none of it
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
        offsets = (place * K + kv) * D
        # looked up a block ahead: else the pipeline's stages would go to the table's, and none to keys and values
        place = cache_places(own_table, at + N, high, N, BLOCK_SIZE)
        best, total, mixed, _ = attend_block(
            # heads are in one part here: what stands for the second is not used
            (best, total, mixed, total), (query, query), keys, values, offsets, seen, seen[None, :],
            (position - n)[None, :], slope[:, None], scale, cap, D, SIZE, 0, HAS_CAP, HAS_SLOPES, True,
        )  # fmt: skip
    if JOINS_ITSELF and splits == 1:
        tl.store(out + q_at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=q_mask)
        return
    of_head = item * H + head
    tl.store(top + of_head, best, mask=is_head)
    tl.store(mass + of_head, total, mask=is_head)
    tl.store(acc + of_head[:, None] * D + d[None, :], mixed, mask=q_mask)
    if JOINS_ITSELF:
        tl.debug_barrier()  # all threads' stores stand before the count that tells of them
        arrived = tl.atomic_add(arrivals + row * K + kv, 1, sem="acq_rel", scope="gpu")
        if arrived == splits - 1:
            tl.store(arrivals + row * K + kv, 0)
            of_first = (item - split) * H + head
            result = _joined(
                acc + of_first[:, None] * D + d[None, :], top + of_first, mass + of_first,
                q_mask, is_head, splits, H, D, G, SIZE, AHEAD,
            )  # fmt: skip
            tl.store(out + q_at, result.to(out.dtype.element_ty), mask=q_mask)


@triton.jit
def _joined(
    acc, top, mass, mask, is_head, splits,
    H: tl.constexpr, D: tl.constexpr, G: tl.constexpr, SIZE: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """[G, SIZE] of all splits, always in their order; those of `AHEAD` are fetched at once."""
    best = tl.full([G], float("-inf"), dtype=tl.float32)
    total = tl.zeros([G], dtype=tl.float32)
    mixed = tl.zeros([G, SIZE], dtype=tl.float32)
    for begin in range(0, splits, AHEAD):
        for ahead in tl.static_range(AHEAD):
            split = begin + ahead + tl.zeros([G], dtype=tl.int32)
            is_there, at = is_head & (split < splits), (begin + ahead) * H
            own = tl.load(top + at, mask=is_there, other=0.0, cache_modifier=".cg")
            own = tl.where(split < splits, own, float("-inf"))
            weight = tl.load(mass + at, mask=is_there, other=1.0, cache_modifier=".cg")
            values = tl.load(
                acc + at * D, mask=mask & is_there[:, None], other=0.0, cache_modifier=".cg"
            )
            higher = tl.maximum(best, own)
            shrink, share = tl.exp2(best - higher), tl.exp2(own - higher)
            best, total = higher, total * shrink + weight * share
            mixed = mixed * shrink[:, None] + values * share[:, None]
    return mixed / total[:, None]


@triton.jit(do_not_specialize_on_alignment=["items", "rows", "top", "mass"])
def join_splits_kernel(
    acc, top, mass, out, rows,
    H: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, AT_ONCE: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, splits = tl.load(rows + 2 * row).to(tl.int64), tl.load(rows + 2 * row + 1)
    await_before(IS_CHAINED)
    d = tl.arange(0, SIZE)
    best, total = float("-inf"), 0.0
    mixed = tl.zeros([SIZE], dtype=tl.float32)
    for begin in range(0, splits, AT_ONCE):
        split = begin + tl.arange(0, AT_ONCE)
        of_head = (first + split) * H + head
        own = tl.load(top + of_head, mask=split < splits, other=float("-inf"))
        higher = tl.maximum(best, tl.max(own, 0))
        shrink, share = tl.exp2(best - higher), tl.exp2(own - higher)
        weight = tl.load(mass + of_head, mask=split < splits, other=0.0)
        mask = (split < splits)[:, None] & (d < D)[None, :]
        values = tl.load(acc + of_head[:, None] * D + d[None, :], mask=mask, other=0.0)
        best, total = higher, total * shrink + tl.sum(weight * share, 0)
        mixed = mixed * shrink + tl.sum(values * share[:, None], 0)
    tl.store(out + (row * H + head) * D + d, (mixed / total).to(out.dtype.element_ty), mask=d < D)


def decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    block_size: int,
    slots: torch.Tensor,
    positions: torch.Tensor,
    splits: ContextSplits,
    head_starts: torch.Tensor,
    num_shared: int,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [B, H, D] -> [B, H, D], of tokens at `positions` [B] of `slots` [B], whose own keys and values are
    in the cache [N, K, D] already; `table` [slots, blocks] says where, `splits` how their contexts are split.

    Query heads [head_starts[k], head_starts[k + 1]) read KV head k, at most `num_shared` of them.
    """
    num_sequences, num_heads, head_dim = q.shape
    num_kv_heads, num_items = keys.shape[1], len(splits.items)
    out = torch.empty_like(q)
    acc = q.new_empty(num_items * num_heads * head_dim, dtype=torch.float32)
    top, mass = q.new_empty(2, num_items * num_heads, dtype=torch.float32).unbind(0)
    size = triton.next_power_of_2(max(16, head_dim))
    is_small = splits.block * size <= 32 * 128
    decode_attention_kernel[(num_kv_heads, num_items)](
        q, keys, values, table, splits.items, splits.arrivals, slots, positions, head_starts,
        slopes if slopes is not None else q, out, acc, top, mass,
        scale, cap or 0.0, table.stride(0),
        H=num_heads, K=num_kv_heads, D=head_dim, SIZE=size,
        G=triton.next_power_of_2(max(16, num_shared)), N=splits.block,
        BLOCK_SIZE=block_size, WINDOW=window or 0,
        HAS_CAP=cap is not None, HAS_SLOPES=slopes is not None, JOINS_ITSELF=splits.join_themselves,
        AHEAD=_FETCHED_AT_ONCE, num_warps=4, num_stages=3 if is_small else 2,
        maxnreg=_REGISTERS if is_small else None, **chained(q),
    )  # fmt: skip
    if not splits.join_themselves:
        join_splits_kernel[(num_heads, num_sequences)](
            acc, top, mass, out, splits.rows, H=num_heads, D=head_dim, SIZE=size,
            AT_ONCE=min(splits.even, _SPLITS_AT_ONCE), num_warps=4, **chained(q),
        )  # fmt: skip
    return out
