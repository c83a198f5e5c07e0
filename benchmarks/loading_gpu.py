"""How fast ranks on GPUs load a model's files that lie in the page cache, beside what copies from pinned memory take.

    python benchmarks/loading_gpu.py --folder DIR --name 2x-h200 [--model 7b] [--rounds 3]

Makes a bfloat16 Llama checkpoint of random bits in DIR and shards it to tp 2. One rank then loads the checkpoint, and
two ranks at once the checkpoint and the shards; each rank's bytes over the time from its first read to its last copy.
Then a process of its own starts from each, and has a first token, with graphs of up to 256 requests.
"""

from __future__ import annotations

import os
import shutil
import statistics
from pathlib import Path
from typing import Any

import command_line
import record
import torch
from shard import LLAMA, SHAPES, make_checkpoint
from starting import seconds_to_first_token

from bireme import LLM
from bireme.checkpoint.prepared import shard_model
from bireme.config import ParallelConfig
from bireme.trace import SpanKind

PINNED_BYTES = 1 << 30


def pinned_bytes_per_s() -> float:
    """From pinned memory to one GPU, in one large copy."""
    source = torch.empty(PINNED_BYTES, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device="cuda")
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    target.copy_(source, non_blocking=True)
    marks[0].record()
    target.copy_(source, non_blocking=True)
    marks[1].record()
    torch.cuda.synchronize()
    return PINNED_BYTES / (float(marks[0].elapsed_time(marks[1])) / 1e3)


def bytes_per_s(folder: Path, tp: int) -> list[float]:
    """Of each rank."""
    with LLM(
        folder, device="cuda", tensor_parallel_size=tp, enforce_eager=True, max_num_batched_tokens=512
    ) as llm:  # fmt: skip
        loads = [
            next(span for span in spans if span.kind is SpanKind.LOAD)
            for spans in llm.executor.spans().values()
        ]
        needed = [loaded.needed_bytes for loaded in llm.executor.loaded]
    return [
        1e9 * num_bytes / (span.end_ns - span.start_ns)
        for num_bytes, span in zip(needed, loads, strict=True)
    ]


def start_s(folder: Path, tp: int) -> float:
    settings = {
        "model": str(folder), "device": "cuda", "tensor_parallel_size": tp, "max_num_seqs": 256,
        "max_num_batched_tokens": 4096,
    }  # fmt: skip
    return seconds_to_first_token(settings, {})


def main() -> None:
    parser = command_line.parser_of(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where to write, on the disk")
    command_line.add_name(parser)
    parser.add_argument("--model", choices=SHAPES, default="7b")
    parser.add_argument("--rounds", type=command_line.count, default=3)
    asked = parser.parse_args()
    command_line.need_gpus(parser)
    if not os.access(asked.folder, os.W_OK | os.X_OK):
        parser.error(f"--folder {asked.folder} is no folder that can be written to")
    work = asked.folder / "bireme-loading-benchmark"
    shutil.rmtree(work, ignore_errors=True)
    checkpoint, shards = work / "checkpoint", work / "tp2"
    ways = {"checkpoint, one rank": (checkpoint, 1)}
    if torch.cuda.device_count() > 1:
        ways |= {"checkpoint, two ranks": (checkpoint, 2), "shards, two ranks": (shards, 2)}
    found: dict[str, list[list[float]]] = {name: [] for name in ways}
    starts: dict[str, list[float]] = {}
    try:
        num_bytes = make_checkpoint(checkpoint, {**LLAMA, **SHAPES[asked.model]})
        if len(ways) > 1:
            shard_model(checkpoint, shards, ParallelConfig.of(2))
        for _ in range(asked.rounds):
            for name, (folder, tp) in ways.items():
                found[name].append(bytes_per_s(folder, tp))
        for name, (folder, tp) in ways.items():
            start_s(folder, tp)  # compiles what is not there yet
            starts[name] = [start_s(folder, tp) for _ in range(asked.rounds)]
    finally:
        shutil.rmtree(work, ignore_errors=True)
    pinned = pinned_bytes_per_s()
    result: dict[str, Any] = {
        "num_bytes": num_bytes, "pinned_bytes_per_s": pinned, "bytes_per_s_by_rank": found,
        "start_s": starts,
    }  # fmt: skip
    print(f"{num_bytes / 1e9:.1f} GB; from pinned memory {pinned / 1e9:.1f} GB/s")
    for name, rounds in found.items():
        slowest = [min(rates) / 1e9 for rates in rounds]
        said = ", ".join(f"{rate:.1f}" for rate in slowest)
        print(f"{name}: GB/s of the slower rank, median {statistics.median(slowest):.1f} ({said})")
        said = ", ".join(f"{took:.1f}" for took in starts[name])
        print(f"    start to first token, s: {statistics.median(starts[name]):.1f} ({said})")
    record.write(f"loading-{asked.model}-{asked.name}", ["torch", "safetensors", "triton"], result)


if __name__ == "__main__":
    main()
