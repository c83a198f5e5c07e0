"""Attention over a paged cache on a GPU: decode by what it reads a second, prefill by its operations.

    python benchmarks/attention_gpu.py --name 1x-h200 [--block-sizes 16,64]

In a CUDA graph, over more caches than the device's own cache holds, whose blocks lie in no order. Decode, of contexts
of one length and of one long context among short ones: the bytes of keys and values beside what a large sum reads, or a
large copy reads and writes, a second, whichever is more; and the time to split contexts, once a step for all layers.
Prefill: a chunk behind a context, with the chunk's own keys and values read where they were projected, as steps do;
causal operations beside those of a large product, of heads of 64, 80 and 96 too, and where there is no context, torch's
flash and cuDNN's attention.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import command_line
import record
import torch
import torch.nn.functional as F
from gpu_floors import NO_CACHE_BYTES, flop_per_s, memory_rates, microseconds, numbers
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from bireme.kernels.gpu.decode_attention import decode_attention
from bireme.kernels.gpu.prefill_attention import prefill_attention
from bireme.kernels.gpu.split_contexts import split_contexts
from bireme.kernels.query_tiles import Tiles

DEVICE = torch.device("cuda")
HEADS = {  # query heads, KV heads, head size
    "7B": (32, 32, 128), "7B / 2": (16, 16, 128), "70B / 2": (32, 4, 128),  # of a rank
    "heads of 64": (56, 8, 64), "heads of 80": (40, 8, 80), "heads of 96": (32, 32, 96),
}  # fmt: skip
DECODED = ("7B", "7B / 2", "70B / 2")
DECODES = list(product((1, 3, 8, 20, 40, 64, 128), (192, 1024)))  # sequences, context
UNEVEN = [(8, 192, 50_000), (64, 192, 50_000)]  # sequences, context, that of the last one
PREFILLS = [(1024, 0), (3584, 0), (4096, 28672)]  # new tokens, context before


TORCH_WAYS = {
    SDPBackend.FLASH_ATTENTION: can_use_flash_attention,
    SDPBackend.CUDNN_ATTENTION: can_use_cudnn_attention,
}


@dataclass(frozen=True)
class Shape:
    """New tokens [T] of `num_seqs` sequences, with so many tokens of context before, and the last one with `longest`,
    where that is more."""

    heads: str
    block_size: int
    num_seqs: int
    num_tokens: int
    before: int
    longest: int = 0

    @property
    def contexts(self) -> list[int]:
        """Of all sequences, before the new tokens."""
        return [self.before] * (self.num_seqs - 1) + [max(self.before, self.longest)]

    @property
    def num_blocks(self) -> list[int]:
        """Of each sequence."""
        return [-(-(before + self.num_tokens) // self.block_size) for before in self.contexts]

    def caches(self) -> list[torch.Tensor]:
        """Keys and values [2, places, K, D]."""
        places = sum(self.num_blocks) * self.block_size
        size = (2, places, *HEADS[self.heads][1:])
        count = max(2, NO_CACHE_BYTES // (2 * math.prod(size)))
        return [torch.randn(size, device=DEVICE, dtype=torch.bfloat16) for _ in range(count)]

    def table(self) -> torch.Tensor:
        blocks = torch.randperm(sum(self.num_blocks), device=DEVICE).int()
        return pad_sequence(blocks.split(self.num_blocks), batch_first=True)


def decode_us(shape: Shape) -> float:
    num_heads, num_kv, head_dim = HEADS[shape.heads]
    q = torch.randn(shape.num_seqs, num_heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
    slots, table = torch.arange(shape.num_seqs, device=DEVICE), shape.table()
    positions = torch.tensor(shape.contexts, device=DEVICE)
    splits = split_contexts(positions, num_kv, head_dim)
    group = num_heads // num_kv
    starts = torch.arange(0, num_heads + 1, group, device=DEVICE, dtype=torch.int32)

    def attend(cache: torch.Tensor) -> torch.Tensor:
        return decode_attention(
            q, cache[0], cache[1], table, shape.block_size, slots, positions, splits, starts,
            group, head_dim**-0.5,
        )  # fmt: skip

    return microseconds(attend, shape.caches())


def split_us(shape: Shape) -> float:
    """To split the contexts, 64 times in a graph."""
    positions = torch.tensor(shape.contexts, device=DEVICE)
    _, num_kv, head_dim = HEADS[shape.heads]
    return microseconds(
        lambda those: split_contexts(those, num_kv, head_dim).items, [positions] * 64
    )


def prefill_us(shape: Shape) -> float:
    num_heads, num_kv, head_dim = HEADS[shape.heads]
    width = (num_heads + 2 * num_kv) * head_dim
    qkv = torch.randn(shape.num_tokens, width, device=DEVICE, dtype=torch.bfloat16)
    q = qkv[:, : num_heads * head_dim].reshape(shape.num_tokens, num_heads, head_dim)
    slots, table = torch.zeros(shape.num_tokens, dtype=torch.int64, device=DEVICE), shape.table()
    tiles = Tiles.of([shape.before], [shape.num_tokens], DEVICE)
    head_map = (torch.arange(num_heads, device=DEVICE) * num_kv // num_heads).int()

    def attend(cache: torch.Tensor) -> torch.Tensor:
        return prefill_attention(
            q, cache[0], cache[1], table, shape.block_size, slots, tiles, head_map,
            head_dim**-0.5, qkv=qkv,
        )  # fmt: skip

    return microseconds(attend, shape.caches())


def torch_us(shape: Shape) -> dict[str, float]:
    """Of a prompt without context, by each of torch's fast ways that is there."""
    num_heads, num_kv, head_dim = HEADS[shape.heads]
    q, k, v = (
        torch.randn(1, heads, shape.num_tokens, head_dim, device=DEVICE, dtype=torch.bfloat16)
        for heads in (num_heads, num_kv, num_kv)
    )

    def attend(queries: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            queries, k, v, is_causal=True, enable_gqa=num_kv < num_heads
        )

    asked = SDPAParams(q, k, v, None, 0.0, True, num_kv < num_heads)
    found = {}
    for way, can_use in TORCH_WAYS.items():
        if can_use(asked):
            with sdpa_kernel(way):
                found[way.name] = microseconds(attend, [q, q.clone()])
    return found


def measure(shape: Shape, read_bytes_per_s: float, rate: float) -> dict[str, Any]:
    num_heads, num_kv, head_dim = HEADS[shape.heads]
    if shape.num_tokens == 1:
        num_bytes = 4 * (sum(shape.contexts) + shape.num_seqs) * num_kv * head_dim
        taken_us, floor_us = decode_us(shape), 1e6 * num_bytes / read_bytes_per_s
    else:
        pairs = shape.num_tokens * (shape.before + (shape.num_tokens + 1) / 2)
        taken_us, floor_us = prefill_us(shape), 1e6 * 4 * pairs * num_heads * head_dim / rate
    found = {**asdict(shape), "us": taken_us, "floor_us": floor_us}
    if shape.num_tokens == 1:
        found["split_us"] = split_us(shape)
    elif not shape.before:
        found["torch_us"] = torch_us(shape)
    return found


def main() -> None:
    parser = command_line.parser_of(__doc__)
    command_line.add_name(parser)
    parser.add_argument(
        "--block-sizes", type=command_line.counts, default="16,64", help="of the cache, in tokens"
    )
    asked = parser.parse_args()
    command_line.need_gpus(parser)
    rates, rate = memory_rates(), flop_per_s()
    torch.cuda.empty_cache()
    found = []
    for size, heads in product(numbers(asked.block_sizes), HEADS):
        shapes = []
        if heads in DECODED:
            shapes += [Shape(heads, size, seqs, 1, context - 1) for seqs, context in DECODES]
            shapes += [Shape(heads, size, seqs, 1, one - 1, most - 1) for seqs, one, most in UNEVEN]
        shapes += [Shape(heads, size, 1, count, before) for count, before in PREFILLS]
        for shape in shapes:
            found.append(measure(shape, max(rates.values()), rate))
            one = found[-1]
            longest = f", one behind {shape.longest}" if shape.longest else ""
            print(
                f"{heads:11} blocks of {size}, {shape.num_seqs:3} x {shape.num_tokens} tokens behind "
                f"{shape.before}{longest}: {one['us']:.1f} us ({one['floor_us'] / one['us']:.0%})",
                *([f"to split {one['split_us']:.1f}"] if "split_us" in one else []),
                *(f"{name} {us:.1f}" for name, us in one.get("torch_us", {}).items()),
                flush=True,
            )
    record.write(
        f"attention-{asked.name}", ["torch", "triton"],
        {**rates, "flop_per_s": rate, "shapes": found},
    )  # fmt: skip


if __name__ == "__main__":
    main()
