"""A checkpoint of a real model's shape: sharded to tp 4, loaded by four ranks, verified.

    python benchmarks/whole_exercise.py examples/configs/llama-2-7b --folder DIR

Makes the checkpoint in DIR unless it is there, and keeps what was measured: seconds, bytes a rank,
and the certificate against the uncut model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import command_line
import record

from bireme import LLM
from bireme.checkpoint.prepared import prepare_model
from bireme.config import EngineConfig, ParallelConfig, format_bytes
from bireme.engine.pool import WorkerPool
from bireme.models.registry import model_layout
from bireme.verify import certificate_text, verify

LAYOUT = ParallelConfig.of(4)


def run(*command: str) -> float:
    """Seconds of a command."""
    print("$", *command, flush=True)
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True)
    return time.perf_counter() - start


def resident(folder: Path, max_model_len: int) -> list[dict[str, Any]]:
    """What each of the four ranks holds and read."""
    with LLM(folder, tensor_parallel_size=4, max_model_len=max_model_len, max_num_seqs=4) as llm:
        return [
            {"weight_bytes": rank.weight_bytes, "needed_bytes": rank.needed_bytes, "fetched_bytes": rank.fetched_bytes,
             "verified_bytes": rank.verified_bytes, "seconds": rank.seconds}
            for rank in llm.loaded
        ]  # fmt: skip


def main() -> None:
    parser = command_line.parser_of(__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--max-model-len", type=int, default=256)
    arguments = parser.parse_args()
    source, shards = arguments.folder / "source", arguments.folder / "shards"
    if not source.exists():
        run("examples/make_checkpoint.py", str(arguments.config), str(source))
    shard_s = run("-m", "bireme", "shard", str(source), str(shards), "-tp", "4")
    ranks = resident(shards, arguments.max_model_len)
    model = prepare_model(str(shards))
    layout = model_layout(model.config, LAYOUT)
    whole = 2 * sum(
        rank.num_elements for rank in model_layout(model.config, ParallelConfig()).ranks
    )
    extra = {name: 2 * count for name, count in layout.replicated_elements.items()}
    config = EngineConfig(parallel=LAYOUT, max_model_len=arguments.max_model_len, max_num_seqs=4)
    prompts = [list(range(start, start + 16)) for start in (100, 9000)]
    start = time.perf_counter()
    with WorkerPool() as pool:
        certificate = verify(model, config, prompts, num_decode=8, pool=pool)
    print(certificate_text(certificate))
    for index, rank in enumerate(ranks):
        print(
            f"rank {index}: {format_bytes(rank['weight_bytes'])} of weights, "
            f"{rank['weight_bytes'] / whole:.4f} of the whole"
        )
    print(
        f"replicated beyond the first copy: {format_bytes(sum(extra.values()))} in {len(extra)} tensors"
    )
    result = {
        "model": arguments.config.name,
        "whole_bytes": whole,
        "shard_s": shard_s,
        "ranks": ranks,
        "replicated_bytes": sum(extra.values()),
        "replicated_tensors": sorted({name.split(".")[-2] for name in extra}),
        "verify_s": time.perf_counter() - start,
        "certificate": json.loads(json.dumps(asdict(certificate))),
    }
    record.write(f"whole-exercise-{arguments.config.name}", ["bireme", "torch"], result)


if __name__ == "__main__":
    main()
