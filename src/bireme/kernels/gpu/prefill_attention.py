"""Attention of runs of new tokens over a paged cache: a prompt's chunk against all that came before it.

Each program takes a tile of one run's queries for one head, and goes through the context once with running
maxima and sums (flash attention). Shapes: T tokens, H query heads, K KV heads, D head size, R runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from bireme.kernels.gpu.decode_attention import LOG2E

TILE = 128  # queries


@triton.jit
def _kernel(
    q, keys, values, table, slots, tiles, head_map, slopes, out, scale, cap, table_stride,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(1), tl.program_id(0)
    row = tl.load(tiles + tile * 3).to(tl.int64)  # its first, in the step
    position = tl.load(tiles + tile * 3 + 1)  # of that row
    count = tl.load(tiles + tile * 3 + 2)  # of rows
    slot = tl.load(slots + row).to(tl.int64)
    kv = tl.load(head_map + head)

    m, d = tl.arange(0, M), tl.arange(0, SIZE)
    q_at = ((row + m) * H + head)[:, None] * D + d[None, :]
    q_mask = (m < count)[:, None] & (d[None, :] < D)
    query = tl.load(q + q_at, mask=q_mask, other=0.0)
    at_m = position + m
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(slopes + head)

    best = tl.full([M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)
    mixed = tl.zeros([M, SIZE], dtype=tl.float32)
    stop, low = position + count, 0
    if WINDOW > 0:
        low = tl.maximum(0, position - WINDOW + 1) // N * N
    for at in range(low, stop, N):
        n = at + tl.arange(0, N)
        inside = n < stop
        block = tl.load(table + slot * table_stride + n // BLOCK_SIZE, mask=inside, other=0)
        place = block.to(tl.int64) * BLOCK_SIZE + n % BLOCK_SIZE
        kv_at = (place * K + kv)[:, None] * D + d[None, :]
        kv_mask = inside[:, None] & (d[None, :] < D)
        k = tl.load(keys + kv_at, mask=kv_mask, other=0.0)
        score = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        if HAS_CAP:  # cap * tanh(score / cap)
            score = cap * (1 - 2 / (tl.exp(2 * score / cap) + 1))
        distance = at_m[:, None] - n[None, :]
        if HAS_SLOPES:
            score -= slope * distance.to(tl.float32)
        seen = distance >= 0
        if WINDOW > 0:
            seen &= distance < WINDOW
        score = tl.where(seen, score * LOG2E, float("-inf"))
        higher = tl.maximum(best, tl.max(score, 1))
        higher_or_0 = tl.where(higher == float("-inf"), 0.0, higher)  # where nothing is seen yet
        p = tl.exp2(score - higher_or_0[:, None])
        shrink = tl.exp2(best - higher_or_0)
        v = tl.load(values + kv_at, mask=kv_mask, other=0.0)
        total = total * shrink + tl.sum(p, 1)
        mixed = mixed * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        best = higher
    total = tl.where(total == 0.0, 1.0, total)  # of rows behind the last
    tl.store(out + q_at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=q_mask)


@dataclass(frozen=True)
class Tiles:
    """Where a step's runs lie: int32 [tiles, 3] of first row, its position, and rows."""

    on_device: torch.Tensor

    @classmethod
    def of(cls, starts: Sequence[int], counts: Sequence[int], device: torch.device) -> Tiles:
        """Of runs of `counts` tokens in the step's order, that begin at positions `starts`. The last tiles of a
        run come first: they have most to do."""
        found, row = [], 0
        for start, count in zip(starts, counts, strict=True):
            found += [
                (row + first, start + first, min(TILE, count - first))
                for first in range(0, count, TILE)
            ]
            row += count
        found.sort(key=lambda tile: -tile[1])
        return cls(torch.from_numpy(np.array(found, dtype=np.int32)).to(device, non_blocking=True))


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
) -> torch.Tensor:
    """q [T, H, D] -> [T, H, D], of tokens of `slots` [T], whose own keys and values are in the cache
    [N, K, D] already; `table` [slots, blocks] says where. Query head h reads KV head `head_map[h]`."""
    num_heads, head_dim = q.shape[1:]
    out = torch.empty_like(q)
    size = triton.next_power_of_2(max(16, head_dim))
    is_wide = q.dtype == torch.float32 or size > 128
    _kernel[(num_heads, len(tiles.on_device))](
        q, keys, values, table, slots, tiles.on_device, head_map,
        slopes if slopes is not None else q, out, scale, cap or 0.0, table.stride(0),
        H=num_heads, K=keys.shape[1], D=head_dim, SIZE=size, M=TILE, N=32 if is_wide else 64,
        BLOCK_SIZE=block_size, WINDOW=window or 0, HAS_CAP=cap is not None,
        HAS_SLOPES=slopes is not None, num_warps=8, num_stages=1 if is_wide else 2,
    )  # fmt: skip
    return out
