"""What the GPUs do in the cells of `decode_gpu.py`: milliseconds by kind of kernel, as torch.profiler saw them.

    python benchmarks/step_kernels_gpu.py --name 2x-h200 [--model llama-2-7b] [--layouts 1,1 2,1 1,2]

Of decode, from one token of a request to the next: steps of all the stage's batches. Of prefill, a prompt. `pause`:
longer than 10 us without a kernel; in prefill all that is neither kernel nor between two, by the first token's time
while the profiler runs, which is told beside that without it. Beside the kinds that a floor counts (products,
attention) what they take at the rates of a large copy, or of a large product. Each rank is told of.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import command_line
import record
import torch
from decode_gpu import CONTEXT, INPUT_LEN, OUTPUT_LEN, cells_parser, first_token_s, gaps_s, settings
from gpu_floors import (
    attention_flop,
    flop_per_s,
    memory_rates,
    numbers,
    prefill_flop,
    read_bytes,
)
from readme_tables import told_by_kind

from bireme import LLM
from bireme.observe.kernel_trace import Kernel, kernels

ATTENTION = ("decode_attention", "join_splits", "prefill_attention")
PRODUCTS = ("nvjet", "cutlass", "gemm", "gemv", "few_rows", "one_row", "splitk", "cublas")
BETWEEN_PRODUCTS = ("rms_norm", "rope_and_write", "silu_mul")
KINDS = ["products", "attention", "sums", "norms, rotation, gates", "others", "between", "pause"]
NUM_SEEN = 64  # tokens
SEEN_LEN = CONTEXT - INPUT_LEN + NUM_SEEN // 2  # the last of them have CONTEXT on average
STEP_KERNELS = 20  # that a launch has at least which is a stage's layers
ROUNDS = 3


def kind_of(kernel: Kernel) -> str:
    name = kernel.name.lower()
    if kernel.is_exchange:
        return "sums"
    if name.startswith(ATTENTION):
        return "attention"
    if any(part in name for part in PRODUCTS):
        return "products"
    return "norms, rotation, gates" if name.startswith(BETWEEN_PRODUCTS) else "others"


def by_kind(found: Sequence[Kernel], times: int) -> dict[str, float]:
    """Milliseconds, of as many tokens or prompts."""
    spent: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for it in found:
        spent[kind_of(it)] += it.own_us
        spent["pause" if it.follows_pause else "between"] += it.gap_us
    return {kind: us / 1e3 / times for kind, us in spent.items()}


def last_tokens(found: Sequence[Kernel], batches: int) -> list[Kernel]:
    """The kernels from one launch of a stage's layers to another, NUM_SEEN tokens of each of its batches later."""
    begins: dict[int, float] = {}
    counts = Counter(it.launch for it in found)
    for it in found:
        if counts[it.launch] >= STEP_KERNELS:
            begins.setdefault(it.launch, it.begin_us)
    steps = sorted(begins.values())
    first, last = steps[-1 - NUM_SEEN * batches], steps[-1]
    return [it for it in found if first <= it.begin_us < last]


def seen(
    llm: LLM, folder: Path, run: Callable[[], Sequence[float]]
) -> tuple[Sequence[float], list[list[Kernel]]]:
    """What something tells that runs, and the kernels of each rank meanwhile."""
    llm.executor.begin_profile(folder / "rank-{rank}.json")
    told = run()
    llm.executor.end_profile()
    return told, [kernels(path) for path in sorted(folder.glob("rank-*.json"))]


def measure(
    asked: argparse.Namespace, layout: str, read_bytes_per_s: float, rate: float, folder: Path
) -> dict[str, Any]:
    tp, pp = numbers(layout)
    batches, prefills = numbers(asked.batches), numbers(asked.prefills)
    found: dict[str, Any] = {"tp": tp, "pp": pp, "decode": {}, "prefill": {}}
    with LLM(**settings(asked.model, layout)) as llm:
        # a process's first profile misses kernels
        seen(llm, folder, lambda: gaps_s(llm, 1, 8, seed=0))
        for batch in batches:
            plain = statistics.median(gaps_s(llm, batch, OUTPUT_LEN, seed=batch))
            gaps, ranks = seen(llm, folder, partial(gaps_s, llm, batch, SEEN_LEN, seed=1))
            together = min(batch, pp)
            weights_s = read_bytes(llm, 0) / read_bytes_per_s / tp
            cache_s = read_bytes(llm, -(-batch // pp), CONTEXT) / read_bytes_per_s / tp - weights_s
            found["decode"][batch] = {
                "step_ms": 1e3 * plain, "profiled_ms": 1e3 * statistics.median(gaps),
                "floor_ms": {"products": 1e3 * weights_s, "attention": 1e3 * cache_s},
                "ranks": [by_kind(last_tokens(rank, together), NUM_SEEN) for rank in ranks],
            }  # fmt: skip
        for size in prefills:
            found["prefill"][size] = prompt(llm, size, rate * tp * pp, folder)
    return found


def prompt(llm: LLM, size: int, rate: float, folder: Path) -> dict[str, Any]:
    first_token_s(llm, size, seed=size)
    plain = statistics.median(first_token_s(llm, size, seed=size + at) for at in range(1, 6))
    times, ranks = seen(
        llm, folder, lambda: [first_token_s(llm, size, seed=at) for at in range(ROUNDS)]
    )
    profiled = statistics.mean(times)
    spent = [by_kind(rank, ROUNDS) for rank in ranks]
    for one in spent:
        one["pause"] += 1e3 * profiled - sum(one.values())
    attention = attention_flop(llm, size)
    products = prefill_flop(llm, size) - attention
    floor_ms = {"products": 1e3 * products / rate, "attention": 1e3 * attention / rate}
    return {
        "step_ms": 1e3 * plain, "profiled_ms": 1e3 * profiled, "floor_ms": floor_ms, "ranks": spent,
    }  # fmt: skip


def table(results: Sequence[dict[str, Any]]) -> list[str]:
    """In Markdown, of the first rank of each layout; in brackets the floor."""
    lines = [f"| | ms | profiled | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 3) + "|"]
    for found in results:
        cells = {f"decode, batch {size}": one for size, one in found["decode"].items()}
        cells |= {f"prefill 1 x {size}": one for size, one in found["prefill"].items()}
        for name, one in cells.items():
            layout = f"tp {found['tp']}, pp {found['pp']}"
            lines.append(
                f"| {layout}: {name} | {one['step_ms']:.2f} | {one['profiled_ms']:.2f} | "
                f"{' | '.join(told_by_kind(one, KINDS))} |"
            )
    return lines


def main() -> None:
    parser = cells_parser(__doc__)
    asked = parser.parse_args()
    command_line.need_gpus(parser, layouts=asked.layouts)
    rates, rate = memory_rates(), flop_per_s()  # before there are ranks beside it
    torch.cuda.empty_cache()
    results = []
    for layout in asked.layouts:
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(asked, layout, max(rates.values()), rate, Path(folder)))
        print("\n".join(table(results[-1:])), flush=True)
        record.write(  # what was measured stays, whatever ends the next
            f"step-kernels-{Path(asked.model).name}-{asked.name}", ["torch", "triton"],
            {**rates, "flop_per_s": rate, "layouts": results, "table": table(results)},
        )  # fmt: skip


if __name__ == "__main__":
    main()
