"""Splits contexts once a step, for all layers: into more splits the longer they are, so that programs have about as
much to read. Shapes: B sequences, K KV heads, W splits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from bireme.kernels.choice import MULTIPROCESSORS
from bireme.kernels.context_splits import ContextSplits

_PROGRAMS = 2 * MULTIPROCESSORS  # that a large GPU has at once
_MOST_SHARES = 512  # that contexts are divided into where their last programs join them
_LEAST_JOINED = 256  # positions of a share there: smaller ones save less than joining takes (H200)
_MOST_SPLITS = 64  # of a context, by which so many programs read one of its KV heads at most


@dataclass(frozen=True)
class _Grid:
    """How many splits contexts have. What kernels are compiled for is the same for all numbers of sequences up to a
    power of two: graphs of those numbers alone have all kernels."""

    num_sequences: int
    num_kv_heads: int

    @property
    def most_sequences(self) -> int:
        return int(triton.next_power_of_2(self.num_sequences))

    @property
    def even(self) -> int:
        """Of contexts of one length, where these are a power of two: the next power of two that gives nearly every
        multiprocessor work. Programs are rounded down to one, else 264 for 8 KV heads, 33, would become 64."""
        programs = 1 << (_PROGRAMS.bit_length() - 1)
        wanted = programs // (self.most_sequences * self.num_kv_heads)
        return min(_MOST_SPLITS, 1 << max(0, wanted - 1).bit_length())

    @property
    def num_shares(self) -> int:
        """Of all contexts: where a second kernel joins, so many that `most_sequences` of one length have `even` splits
        each, and fewer up to twice as many. The same contexts are split alike in a graph, which has rows for more, and
        beside it."""
        whole = self.most_sequences * self.num_kv_heads
        return self.even * whole if self.even > 1 else _MOST_SHARES

    @property
    def num_items(self) -> int:
        """At most: each context has one split, and all together not as many more as there are shares of a head."""
        return self.num_sequences + self.num_shares // self.num_kv_heads

    @property
    def most_items(self) -> int:
        return int(
            triton.next_power_of_2(self.most_sequences + self.num_shares // self.num_kv_heads)
        )


@triton.jit(do_not_specialize=["B", "W", "shares"], do_not_specialize_on_alignment=["positions"])
def split_contexts_kernel(
    positions, items, rows, arrivals, B, W, shares,
    K: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, ITEMS: tl.constexpr,
    MOST: tl.constexpr, LEAST: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    row, item = tl.arange(0, ROWS), tl.arange(0, ITEMS)
    stop = tl.load(positions + row, mask=row < B, other=0).to(tl.int32) + 1
    first = tl.zeros([ROWS], dtype=tl.int32)
    if WINDOW > 0:
        first = tl.maximum(0, stop - WINDOW)
    blocks = tl.where(row < B, tl.cdiv(stop, N) - first // N, 0)
    # a graph's empty rows are at position 0: they count for nothing, so that contexts are split as beside it
    counted = tl.sum(tl.where(stop > 1, blocks, 0).to(tl.int64))
    share = tl.maximum(tl.cdiv(counted * K, shares).to(tl.int32), tl.cdiv(tl.max(blocks), MOST))
    share = tl.maximum(share, LEAST)
    nearest = tl.maximum((2 * blocks + share) // (2 * share), 1)
    # splits have as many blocks but for the last: by rounding up, others would be left without any
    per_split = tl.maximum(tl.cdiv(blocks, nearest), 1)
    splits = tl.maximum(tl.cdiv(blocks, per_split), 1)
    own = tl.where(row < B, splits, 0)
    long = tl.where(splits > 1, own, 0)
    # those of long contexts first: what begins last is short
    whole = tl.sum(long) + tl.cumsum(own - long) - 1
    begin = tl.where(splits > 1, tl.cumsum(long) - long, whole)
    tl.store(rows + 2 * row, begin, mask=row < B)
    tl.store(rows + 2 * row + 1, splits, mask=row < B)
    for split in range(tl.max(own)):
        at = items + 3 * (begin + split)
        tl.store(at, row, mask=split < own)
        tl.store(at + 1, split, mask=split < own)
        tl.store(at + 2, splits, mask=split < own)
    tl.store(items + 3 * item + 2, 0, mask=(item >= tl.sum(own)) & (item < W))
    for kv in range(K):
        tl.store(arrivals + row * K + kv, 0, mask=row < B)


def split_contexts(
    positions: torch.Tensor, num_kv_heads: int, head_dim: int, window: int | None = None
) -> ContextSplits:
    """Of sequences whose new tokens are at `positions` [B], with as many items as they can need at most, whatever their
    contexts: a graph that was captured keeps that number."""
    num_sequences = len(positions)
    grid = _Grid(num_sequences, num_kv_heads)
    block = block_positions(num_sequences, num_kv_heads, head_dim)
    items = positions.new_empty(grid.num_items, 3, dtype=torch.int32)
    rows, arrivals = items.new_empty(num_sequences, 2), items.new_empty(num_sequences, num_kv_heads)
    split_contexts_kernel[(1,)](
        positions, items, rows, arrivals, num_sequences, grid.num_items, grid.num_shares,
        K=num_kv_heads, N=block, ROWS=grid.most_sequences, ITEMS=grid.most_items,
        MOST=_MOST_SPLITS, LEAST=_LEAST_JOINED // block if grid.even == 1 else 1, WINDOW=window or 0,
    )  # fmt: skip
    return ContextSplits(items, rows, arrivals, block, grid.even)


def even_splits(
    num_sequences: int, num_kv_heads: int, head_dim: int, device: torch.device
) -> ContextSplits:
    """Of as many splits each, which depend on no context."""
    count = _Grid(num_sequences, num_kv_heads).even
    row = torch.arange(num_sequences, dtype=torch.int32, device=device)
    rows = torch.stack((count * row, torch.full_like(row, count)), 1)
    split = torch.arange(count, dtype=torch.int32, device=device).repeat(num_sequences)
    items = torch.stack((row.repeat_interleave(count), split, torch.full_like(split, count)), 1)
    arrivals = row.new_zeros(num_sequences, num_kv_heads)
    block = block_positions(num_sequences, num_kv_heads, head_dim)
    return ContextSplits(items, rows, arrivals, block, count)


def block_positions(num_sequences: int, num_kv_heads: int, head_dim: int) -> int:
    """Of a context, that a program attends to at a time: smaller blocks begin sooner, larger ones take less in all,
    where programs follow one another."""
    whole = _Grid(num_sequences, num_kv_heads).most_sequences * num_kv_heads
    return 32 if head_dim > 128 or whole <= _PROGRAMS else 64
