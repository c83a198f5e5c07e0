"""`bireme probe` on CUDA devices: one by itself, and what goes on between two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bireme.cli import run
from bireme.cluster.file import read_cluster

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_gpus_are_measured(num_gpus: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < num_gpus:
        pytest.skip(f"needs {num_gpus} CUDA devices")
    path = tmp_path / "cluster.toml"
    arguments = ["probe", "--quick", "--device", "cuda", "--ranks", str(num_gpus), "-o", str(path)]
    assert run(arguments) == 0
    cluster = read_cluster(path)
    (node,) = cluster.nodes
    assert [device.name for device in node.devices] == [f"cuda{i}" for i in range(num_gpus)]
    assert all(all(device.curves) for device in node.devices)
    assert all(point.seconds > 0 for point in cluster.points)
    assert len(cluster.links) == len(cluster.groups) == num_gpus - 1
    assert cluster.measured is not None
    assert {"cuda", "nccl"} <= cluster.measured.versions.keys()
