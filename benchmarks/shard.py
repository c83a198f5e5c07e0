"""How fast a checkpoint is sharded, beside `cp` of the same bytes, and how fast a rank loads.

    python benchmarks/shard.py --folder DIR [--model 1.1b] [--rounds 5]

Makes a bfloat16 Llama checkpoint of random bits in DIR, then does in turn, `--rounds` times, each
from page cache and after the disk has caught up: `cp`, sharding to tp 4, resharding that to tp 3,
exporting it, and loading each rank of tp 4 from the artifact of tp 4, from that of tp 3, and from
the checkpoint itself. Prints the best of the rounds, since what else runs on the machine only ever
adds; the kept result has every round.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import command_line
import numpy as np
import record
import torch
from rich.console import Console
from rich.table import Table

from bireme.checkpoint.artifact import Artifact
from bireme.checkpoint.exporter import export
from bireme.checkpoint.loader import load_parameters, torch_dtype
from bireme.checkpoint.opener import match_source, open_folder
from bireme.checkpoint.prepared import shard_model
from bireme.config import ParallelConfig
from bireme.hf_config import from_hf
from bireme.model_config import ModelConfig
from bireme.models.registry import build_stage, model_layout, partition_layers
from bireme.parallel.mesh import Mesh

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
SHAPES: dict[str, dict[str, Any]] = {
    "1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}
TP = 4
OTHER_TP = 3


def make_checkpoint(folder: Path, config: dict[str, Any]) -> int:
    """One safetensors file of random bits; returns its tensors' bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    sources = model_layout(from_hf(config), ParallelConfig()).sources
    table: dict[str, Any] = {}
    at = 0
    for name, source in sources.items():
        stop = at + 2 * math.prod(source.shape)
        table[name] = {"dtype": "BF16", "shape": source.shape, "data_offsets": [at, stop]}
        at = stop
    header = json.dumps(table).encode()
    random = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for start in range(0, at, 1 << 26):
            file.write(random.bytes(min(1 << 26, at - start)))
    return at


class Run(NamedTuple):
    """Seconds of a step, of the processor for it, and until its bytes are on the disk."""

    wall_s: float
    cpu_s: float
    synced_s: float


def timed(action: Callable[[], Any], num_bytes: int) -> Run:
    """Before it the disk catches up, and the memory that the files will take is touched once: in a
    virtual machine the host gives a page when it is first used, at several times a copy's cost."""
    os.sync()
    np.ones(num_bytes + num_bytes // 8, dtype=np.uint8)
    start, cpu = time.perf_counter(), _cpu_seconds()
    action()
    done, cpu = time.perf_counter(), _cpu_seconds() - cpu
    os.sync()
    return Run(done - start, cpu, time.perf_counter() - start)


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def load_rank(folder: Path, model: ModelConfig, rank: int) -> tuple[float, dict[str, int]]:
    """Seconds to fill one rank's parameters, whose memory is there, and the bytes read for it."""
    parallel = ParallelConfig.of(TP)
    mesh, (spec,) = Mesh(parallel.widths, rank), partition_layers(model, parallel)
    with torch.device("meta"):
        stage = build_stage(model, mesh, spec)
    stage = stage.to(torch_dtype(model.dtype)).to_empty(device="cpu")
    for parameter in stage.parameters():
        parameter.zero_()
    source = open_folder(folder, rank)
    layout = model_layout(model, parallel)
    names = match_source(source, layout, model)
    start = time.perf_counter()
    needed = load_parameters(stage, source, names)
    seconds = time.perf_counter() - start
    read = source.stats if isinstance(source, Artifact) else None
    fetched, verified = (read.fetched, read.verified) if read else (needed, 0)
    return seconds, {"needed": needed, "fetched": fetched, "verified": verified}


def main() -> None:
    parser = command_line.parser_of(__doc__)
    parser.add_argument(
        "--folder",
        type=Path,
        required=True,
        help="made where it is missing; for files of four times the model, whose 1.1b are 2.2 GB",
    )
    parser.add_argument("--model", choices=SHAPES, default="1.1b")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)

    work = args.folder / "bireme-shard-benchmark"
    shutil.rmtree(work, ignore_errors=True)
    config = {**LLAMA, **SHAPES[args.model]}
    model = from_hf(config)
    source, copy, artifact, other = (work / name for name in ("source", "copy", "tp4", "tp3"))
    steps: dict[str, tuple[Path, Callable[[], Any]]] = {
        "cp": (copy, lambda: subprocess.run(["cp", "-r", source, copy], check=True)),
        f"shard to tp {TP}": (
            artifact,
            lambda: shard_model(source, artifact, ParallelConfig.of(TP)),
        ),
        f"reshard to tp {OTHER_TP}": (
            other,
            lambda: shard_model(artifact, other, ParallelConfig.of(OTHER_TP)),
        ),
        "export": (copy, lambda: export(Artifact(artifact), copy)),
    }
    writes: dict[str, list[Run]] = {name: [] for name in steps}
    loads: dict[str, list[float]] = {}
    read: dict[str, dict[str, int]] = {}
    try:
        num_bytes = make_checkpoint(source, config)
        for _ in range(args.rounds):
            for name, (target, action) in steps.items():
                shutil.rmtree(target, ignore_errors=True)
                writes[name].append(timed(action, num_bytes))
            for name, folder in (
                (f"artifact of tp {TP}", artifact),
                (f"artifact of tp {OTHER_TP}", other),
                ("checkpoint", source),
            ):
                for rank in range(TP):
                    seconds, read[name] = load_rank(folder, model, rank)
                    loads.setdefault(name, []).append(seconds)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report(args.model, num_bytes, writes, loads, read)


def report(
    shape: str,
    num_bytes: int,
    writes: dict[str, list[Run]],
    loads: dict[str, list[float]],
    read: dict[str, dict[str, int]],
) -> None:
    console = Console(width=110)
    table = Table(title=f"{num_bytes / 1e9:.2f} GB of bfloat16 in the shape of Llama {shape}")
    table.add_column("written by")
    for name in ("s", "GB/s", "rate / cp's", "CPU s", "s, synced", "GB/s", "rate / cp's"):
        table.add_column(name, justify="right")
    best = {name: Run(*map(min, zip(*runs, strict=True))) for name, runs in writes.items()}
    for name, run in best.items():
        table.add_row(
            name,
            f"{run.wall_s:.2f}",
            f"{num_bytes / run.wall_s / 1e9:.2f}",
            f"{best['cp'].wall_s / run.wall_s:.2f}",
            f"{run.cpu_s:.2f}",
            f"{run.synced_s:.2f}",
            f"{num_bytes / run.synced_s / 1e9:.2f}",
            f"{best['cp'].synced_s / run.synced_s:.2f}",
        )
    console.print(table)
    table = Table(title=f"one rank of tp {TP} loads (bfloat16, on CPU, one thread)")
    for name in ("from", "MB needed", "MB fetched", "MB verified", "s", "GB/s needed"):
        table.add_column(name, justify="left" if name == "from" else "right")
    for name, times in loads.items():
        seconds, count = min(times), read[name]
        megabytes = [f"{count[kind] / 1e6:.0f}" for kind in ("needed", "fetched", "verified")]
        rate = f"{count['needed'] / seconds / 1e9:.2f}"
        table.add_row(name, *megabytes, f"{seconds:.2f}", rate)
    console.print(table)
    result = {
        "what": "every round from page cache; synced_s is until the bytes are on the disk",
        "num_bytes": num_bytes,
        "writes": {name: [run._asdict() for run in runs] for name, runs in writes.items()},
        "shard_rate_over_cp": {
            field: getattr(best["cp"], field) / getattr(best[f"shard to tp {TP}"], field)
            for field in Run._fields
        },
        "load_s_per_rank": loads,
        "load_bytes_of_the_last_rank": read,
    }
    packages = ("bireme", "torch", "numpy", "xxhash", "safetensors")
    record.write(f"shard-{shape}", packages, result)


if __name__ == "__main__":
    main()
