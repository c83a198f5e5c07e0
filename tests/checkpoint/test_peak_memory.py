"""Sharding needs the largest tensor and 256 MiB, mapped pages included, whatever the model's size.

The checkpoints are sparse files: made at once, read and written in full. Each run is a process of
its own, whose peak is counted from after its imports.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.making import GPT2, LLAMA

from bireme.config import ParallelConfig
from bireme.model_config import from_hf
from bireme.models.registry import model_layout

MIB = 1024 * 1024
ALLOWED = 256 * MIB  # beside the largest tensor

MEASURED = """
import sys
from pathlib import Path
from checkpoint.making import matched
from bireme.checkpoint.artifact import Artifact
from bireme.checkpoint.exporter import export
from bireme.checkpoint.opener import open_for_sharding
from bireme.checkpoint.sharder import shard
from bireme.model_config import from_hf, read_json

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def peak(action):
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = status("VmRSS:")
    action()
    print(status("VmHWM:") - before)

source, first, second, out = map(Path, sys.argv[1:])
model = from_hf(read_json(source / "config.json"))

def run(folder, target, widths):
    opened = open_for_sharding(folder)
    shard(opened, target, *matched(opened, model, widths))

peak(lambda: run(source, first, (2,)))
peak(lambda: run(first, second, (3, 1)))
peak(lambda: Artifact(second).check())
peak(lambda: export(Artifact(second), out))
"""


def write_sparse(folder: Path, config: dict[str, Any]) -> tuple[int, int]:
    """A float32 checkpoint of zeros that takes no room; returns its largest tensor and its size."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    sources = model_layout(from_hf(config), ParallelConfig()).sources
    table, at, largest = {}, 0, 0
    for name, source in sources.items():
        shape = source.view.file_shape(source.shape)
        stop = at + 4 * math.prod(shape)
        table[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, stop]}
        largest, at = max(largest, stop - at), stop
    header = json.dumps(table).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + at)
    return largest, at


def peaks(folder: Path) -> list[int]:
    """Bytes above the baseline of: shard, reshard, check, export."""
    parts = [str(folder / name) for name in ("source", "first", "second", "exported")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *parts],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def check(config: dict[str, Any], folder: Path) -> None:
    largest, total = write_sparse(folder / "source", config)
    assert total > 2 * (largest + ALLOWED)
    found = peaks(folder)
    assert max(found) <= largest + ALLOWED, [num_bytes // MIB for num_bytes in found]


def test_many_tensors(tmp_path: Path) -> None:
    wide = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12}
    check({**LLAMA, **wide, "num_attention_heads": 16, "num_key_value_heads": 4}, tmp_path)


@pytest.mark.slow
def test_one_large_transposed_tensor(tmp_path: Path) -> None:
    check({**GPT2, "n_embd": 4096, "n_inner": 12288, "n_layer": 2, "n_head": 16}, tmp_path)


def test_bin_files(tmp_path: Path) -> None:
    wide = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 14}
    config = {**LLAMA, **wide, "num_attention_heads": 16, "num_key_value_heads": 4}
    largest, _ = write_sparse(tmp_path / "source", config)
    (tmp_path / "source" / "model.safetensors").unlink()
    sources = model_layout(from_hf(config), ParallelConfig()).sources
    state = {name: torch.zeros(1).expand(0) for name in sources}
    state = {name: torch.zeros(source.shape) for name, source in sources.items()}
    torch.save(state, tmp_path / "source" / "pytorch_model.bin")
    assert max(peaks(tmp_path)) <= largest + ALLOWED
