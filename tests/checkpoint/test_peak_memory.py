"""Sharding needs the largest tensor and 256 MiB, mapped pages included, whatever the model's size.

The checkpoints are sparse files: made at once, read and written in full. Each run is a process of
its own, whose peak is counted from after its imports.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bireme.checkpoint.reader import SafetensorsFile
from bireme.config import ParallelConfig
from bireme.hf_config import from_hf
from bireme.models.registry import model_layout
from checkpoint.making import GPT2, LLAMA

MIB = 1024 * 1024
ALLOWED = 256 * MIB  # beside the largest tensor

MEASURED = """
import sys
from pathlib import Path
from bireme.checkpoint.artifact import Artifact
from bireme.checkpoint.exporter import export
from bireme.checkpoint.prepared import shard_model
from bireme.config import ParallelConfig

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def peak(action):
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = status("VmRSS:")
    action()
    print(status("VmHWM:") - before)

folder, *phases = sys.argv[1:]
source, first, second, out = (Path(folder) / name for name in ("source", "first", "second", "out"))
actions = {
    "shard": lambda: shard_model(source, first, ParallelConfig.of(2)),
    "reshard": lambda: shard_model(first, second, ParallelConfig.of((3, 1), 2)),
    "check": lambda: Artifact(second).check(),
    "export": lambda: export(Artifact(second), out),
}
for phase in phases:
    peak(actions[phase])
"""
PHASES = ("shard", "reshard", "check", "export")


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


def check_peaks(folder: Path, bound: int, phases: tuple[str, ...] = PHASES) -> None:
    """Runs the phases, and takes the files away: they are large."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(folder), *phases],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    finally:
        shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
    peaks = [int(line) for line in done.stdout.split()]
    assert max(peaks) <= bound, [num_bytes // MIB for num_bytes in peaks]


def llama(num_layers: int) -> dict[str, Any]:
    wide = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": num_layers}
    return {**LLAMA, **wide, "num_attention_heads": 16, "num_key_value_heads": 4}


def test_many_tensors(tmp_path: Path) -> None:
    largest, total = write_sparse(tmp_path / "source", llama(10))
    assert total > 1.5 * (largest + ALLOWED)
    check_peaks(tmp_path, largest + ALLOWED)


@pytest.mark.slow
def test_a_large_transposed_tensor(tmp_path: Path) -> None:
    config = {**GPT2, "n_embd": 2048, "n_inner": 16384, "n_layer": 2, "n_head": 16}
    largest, total = write_sparse(tmp_path / "source", config)
    assert largest == 128 * MIB
    assert total > 1.5 * (largest + ALLOWED)
    check_peaks(tmp_path, largest + ALLOWED)


@pytest.mark.slow
def test_a_head_that_is_compared_with_the_embedding(tmp_path: Path) -> None:
    config = {**llama(1), "vocab_size": 100_000}
    largest, total = write_sparse(tmp_path / "source", config)
    tied = json.dumps({**config, "tie_word_embeddings": True})
    (tmp_path / "source" / "config.json").write_text(tied)
    assert total > 2 * largest > 1.2 * (largest + ALLOWED)
    check_peaks(tmp_path, largest + ALLOWED, ("shard",))


@pytest.mark.slow
def test_a_bin_file(tmp_path: Path) -> None:
    largest, total = write_sparse(tmp_path / "source", llama(10))
    assert total > 1.5 * (largest + ALLOWED)
    file = SafetensorsFile(tmp_path / "source" / "model.safetensors")
    state = {name: torch.zeros(info.shape) for name, info in file.tensors.items()}
    torch.save(state, tmp_path / "source" / "pytorch_model.bin")
    file.path.unlink()
    check_peaks(tmp_path, largest + ALLOWED, ("shard",))
