"""Products of a few rows by block sizes: which read weights fastest, beside cuBLAS and what reads memory alone.

    python benchmarks/few_rows.py --name 1x-h200 [--models llama-2-7b llama-3-70b] [--widths 1,2] [--rows 8,32,64]
    python benchmarks/few_rows.py --name 1x-h200-7b --models llama-2-7b --rows 1,2,4,8,16 --briefly

Of each product of a model's layers, cut for each width: microseconds in a CUDA graph of products by weights that are
in no cache, with what is chosen now, whole and as parts that whoever reads them adds up (which that one's kernel pays
for), with the best of all block sizes, and by cuBLAS (of gated products with the gate's own kernel); and the share that
the weight's bytes are of what a large sum reads, or a large copy reads and writes, in that time. `--briefly` tries no
other blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import command_line
import record
import torch
import torch.nn.functional as F
import triton
from gpu_floors import NO_CACHE_BYTES, memory_rates, microseconds, model_folder, numbers

from bireme.checkpoint.prepared import prepare_model
from bireme.kernels.gpu.chain import chained
from bireme.kernels.gpu.few_rows import block_rows, few_rows_kernel, held_inputs
from bireme.kernels.gpu.gated import silu_mul
from bireme.kernels.linear import gated_linear, linear, linear_in_parts
from bireme.model_config import ModelConfig

BLOCKS = list(product((32, 64, 128), (64, 128, 256), (3, 4, 6), (4, 8)))  # N, K, stages, warps
Block = tuple[int, int, int, int]


def shapes(config: ModelConfig, width: int) -> dict[str, tuple[int, int, bool]]:
    """Outputs, inputs, and whether the weight is a gate's and what it gates."""
    hidden, columns = config.hidden_size, config.intermediate_size // width
    heads = config.num_heads * config.head_dim // width
    kv = config.num_kv_heads * config.head_dim // width
    return {
        "qkv": (heads + 2 * kv, hidden, False), "out": (hidden, heads, False),
        "gate and up": (columns, hidden, True), "down": (hidden, columns, False),
        "head": (config.vocab_size // width, hidden, False),
    }  # fmt: skip


def by_blocks(
    x: torch.Tensor, weight: torch.Tensor, block: Block, *, is_gated: bool
) -> torch.Tensor:
    size_n, size_k, stages, warps = block
    outputs = len(weight) // 2 if is_gated else len(weight)
    out = x.new_empty(len(x), outputs)
    few_rows_kernel[(triton.cdiv(outputs, size_n),)](
        x, weight, weight, out, len(x), outputs, x.shape[1], x.stride(0),
        BLOCK_T=block_rows(len(x)), BLOCK_N=size_n, BLOCK_K=size_k, HELD=held_inputs(len(x)),
        IS_GATED=is_gated, HAS_BIAS=False, **chained(x), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def tried(
    x: torch.Tensor, weights: list[torch.Tensor], *, is_gated: bool
) -> Iterator[tuple[float, Block]]:
    for block in BLOCKS:
        try:
            run = partial(by_blocks, x, block=block, is_gated=is_gated)
            yield microseconds(run, weights), block
        except triton.runtime.errors.OutOfResources:
            continue


def measure(
    num_rows: int, shape: tuple[int, int, bool], bytes_per_s: float, *, tries_blocks: bool
) -> dict[str, Any]:
    outputs, inputs, is_gated = shape
    rows = 2 * outputs if is_gated else outputs
    count = max(2, NO_CACHE_BYTES // (2 * rows * inputs))
    weights = [torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    x = torch.randn(num_rows, inputs, device="cuda", dtype=torch.bfloat16)
    found: dict[str, Any] = {
        "rows": num_rows, "outputs": outputs, "inputs": inputs, "is_gated": is_gated,
        "floor_us": 1e6 * weights[0].nbytes / bytes_per_s,
    }  # fmt: skip
    if is_gated:
        found["now_us"] = microseconds(lambda weight: gated_linear(x, weight, F.silu), weights)
        found["cublas_us"] = microseconds(lambda weight: silu_mul(x @ weight.T), weights)
    else:
        found["now_us"] = microseconds(lambda weight: linear(x, weight), weights)
        found["in_parts_us"] = microseconds(lambda weight: linear_in_parts(x, weight), weights)
        found["cublas_us"] = microseconds(lambda weight: x @ weight.T, weights)
    if tries_blocks:
        found["best_us"], found["best_block"] = min(tried(x, weights, is_gated=is_gated))
    return found


def main() -> None:
    parser = command_line.parser_of(__doc__)
    command_line.add_name(parser)
    parser.add_argument(
        "--models", nargs="+", type=command_line.shape, default=["llama-2-7b", "llama-3-70b"]
    )
    parser.add_argument(
        "--widths", type=command_line.counts, default="1,2", help="of tensor groups"
    )
    parser.add_argument("--rows", type=command_line.counts, default="8,32,64")
    parser.add_argument("--briefly", action="store_true", help="try no other blocks")
    asked = parser.parse_args()
    command_line.need_gpus(parser)
    rates, found = memory_rates(), []
    torch.cuda.empty_cache()
    for model, width in product(asked.models, numbers(asked.widths)):
        config = prepare_model(model_folder(model), needs_weights=False).config
        for num_rows, (name, shape) in product(numbers(asked.rows), shapes(config, width).items()):
            one = measure(num_rows, shape, max(rates.values()), tries_blocks=not asked.briefly)
            found.append({"model": model, "width": width, "product": name, **one})
            more = f", in parts {one['in_parts_us']:7.1f}" if "in_parts_us" in one else ""
            best = "" if asked.briefly else f", best {one['best_us']:7.1f} {one['best_block']}"
            print(
                f"{model} / {width} {name:12} {num_rows:3} rows: now {one['now_us']:7.1f} us "
                f"({one['floor_us'] / one['now_us']:.0%}){more}, cuBLAS {one['cublas_us']:7.1f}{best}",
                flush=True,
            )
    record.write(
        f"few-rows-{asked.name}", ["torch", "triton"],
        {"gpu": torch.cuda.get_device_name(), **rates, "products": found},
    )  # fmt: skip


if __name__ == "__main__":
    main()
