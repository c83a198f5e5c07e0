"""A 7B shape on one GPU or two: decode by batch, prefill, throughput, and the start; beside floors of memory.

    python benchmarks/decode_gpu.py --name 2x-h200 [--layouts 1,1 2,1 1,2] [--batches 1,8,32,64,128]

Llama-2-7B's shape with made-up weights in bfloat16, greedy. Decode: prompts of 128 tokens, continued by 128; the
median time between two tokens of a request. Prefill: the time to the first token of one prompt, the least of three
after one that does not count. Throughput: 512 requests of 512 tokens continued by 128, at most 256 at once. Ready: from
asking for the ranks' processes to the end of their first step. A floor is what a step must read (all weights but the
embedding, and the cache of its requests) by what a large copy on one GPU reads and writes a second, over the ranks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record
import torch

from bireme import LLM
from bireme.bench.answer_times import Latencies
from bireme.bench.throughput import measure_throughput
from bireme.bench.workload import Workload

MODEL = Path(__file__).parent.parent / "examples" / "configs" / "llama-2-7b"
INPUT_LEN, OUTPUT_LEN = 128, 128
PREFILLS = (1024, 3584)
LOAD = Workload(num_prompts=512, input_len=512, output_len=128, seed=5)


def copy_bytes_per_s() -> float:
    """Read and written by a copy on one GPU."""
    source = torch.randn(1 << 29, device="cuda").half()
    target = torch.empty_like(source)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    target.copy_(source)
    marks[0].record()
    for _ in range(10):
        target.copy_(source)
    marks[1].record()
    torch.cuda.synchronize()
    return 10 * 2 * source.nbytes / (float(marks[0].elapsed_time(marks[1])) / 1e3)


def gaps_s(llm: LLM, batch: int, output_len: int, seed: int) -> list[float]:
    seen = Latencies()
    workload = Workload(num_prompts=batch, input_len=INPUT_LEN, output_len=output_len, seed=seed)
    measure_throughput(llm, workload, seen=seen.note)
    return seen.gaps_s


def first_token_s(llm: LLM, num_tokens: int, seed: int) -> float:
    seen = Latencies()
    workload = Workload(num_prompts=1, input_len=num_tokens, output_len=1, seed=seed)
    measure_throughput(llm, workload, seen=seen.note)
    return seen.told().requests[0].ttft_s


def step_bytes(llm: LLM, batch: int) -> int:
    """That all ranks together must read in a step of decoding."""
    config = llm.model.config
    weights = sum(loaded.weight_bytes for loaded in llm.executor.loaded)
    embedding = 2 * config.vocab_size * config.hidden_size
    token = 4 * config.num_layers * config.num_kv_heads * config.head_dim
    return weights - embedding + batch * (INPUT_LEN + OUTPUT_LEN // 2) * token


def measure(tp: int, pp: int, batches: Sequence[int], read_bytes_per_s: float) -> dict[str, Any]:
    start = time.monotonic()
    with LLM(
        str(MODEL), load_format="dummy", device="cuda", dtype="bfloat16", tensor_parallel_size=tp,
        pipeline_parallel_size=pp, max_num_seqs=256, max_num_batched_tokens=4096,
        enable_prefix_caching=False,
    ) as llm:  # fmt: skip
        found: dict[str, Any] = {"tp": tp, "pp": pp, "ready_s": time.monotonic() - start}
        found["load_s"] = [loaded.seconds for loaded in llm.executor.loaded]
        found["decode"] = {}
        for batch in batches:
            gaps_s(llm, batch, 8, seed=batch)
            gaps = gaps_s(llm, batch, OUTPUT_LEN, seed=1000 + batch)
            in_turn = 1 if tp > 1 else pp  # stages read one after the other
            floor_s = step_bytes(llm, batch) / read_bytes_per_s / (tp * pp) * in_turn
            tenths = statistics.quantiles(gaps, n=10)
            found["decode"][batch] = {
                "step_s": statistics.median(gaps), "p10_s": tenths[0], "p90_s": tenths[-1],
                "floor_s": floor_s,
            }  # fmt: skip
        found["prefill_s"] = {
            size: min(first_token_s(llm, size, seed=size + i) for i in range(4)[1:])
            for size in PREFILLS
        }
        found["throughput"] = measure_throughput(llm, LOAD).as_json()
    return found


def show(found: dict[str, Any]) -> None:
    print(f"tp {found['tp']}, pp {found['pp']}: ready in {found['ready_s']:.1f} s")
    for batch, one in found["decode"].items():
        share = one["floor_s"] / one["step_s"]
        print(f"  batch {batch:3}: {1e3 * one['step_s']:.2f} ms a step, floor {share:.0%} of it")
    for size, seconds in found["prefill_s"].items():
        print(f"  prefill of {size}: {1e3 * seconds:.1f} ms")
    print(f"  {found['throughput']['output_tokens_per_second']:.0f} tokens/s of output")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--name", required=True)
    parser.add_argument("--layouts", nargs="+", default=["1,1", "2,1", "1,2"])
    parser.add_argument("--batches", default="1,8,32,64,128")
    arguments = parser.parse_args()
    rate = copy_bytes_per_s()
    batches = [int(size) for size in arguments.batches.split(",")]
    results = []
    for layout in arguments.layouts:
        tp, pp = (int(width) for width in layout.split(","))
        results.append(measure(tp, pp, batches, rate))
        show(results[-1])
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    record.write(
        f"decode-7b-{arguments.name}", ["torch"],
        {"gpus": gpus, "copy_bytes_per_s": rate, "layouts": results},
    )  # fmt: skip


if __name__ == "__main__":
    main()
