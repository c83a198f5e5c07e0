"""What the GPU tier shares: certificates that are kept, and the devices of a pair of ranks.

BIREME_GPU_RESULTS names a file that takes the certificates with the hardware, the versions and the
commit, or, of tests that run side by side, a file for each of pytest-xdist's workers; the last ones
are kept under benchmarks/results/.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bireme import __version__
from bireme.checkpoint.prepared import prepare_model
from bireme.config import EngineConfig, ParallelConfig
from bireme.engine.pool import WorkerPool
from bireme.planning.probe import hardware
from bireme.verify import Certificate, verify
from families import zoo


def _commit() -> str:
    given = os.environ.get("BIREME_COMMIT")
    if given:
        return given
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _environment() -> dict[str, Any]:
    count = torch.cuda.device_count()
    return {
        "gpus": [torch.cuda.get_device_name(index) for index in range(count)],
        "bireme": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": hardware.nccl_version(),
        "python": platform.python_version(),
        "command": "scripts/test -m gpu",
    }


class Checker:
    """Verifies models on GPUs and keeps every certificate, passed or not."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self.certificates: list[dict[str, Any]] = []

    def __call__(
        self,
        model: Path | str,
        dtype: str,
        *,
        tp: int = 1,
        pp: int = 1,
        devices: tuple[int, ...] | None = None,
        load_format: str = "auto",
        name: str | None = None,
        **more: Any,
    ) -> Certificate:
        config = EngineConfig(
            parallel=ParallelConfig.of(tp, pp), device="cuda", dtype=dtype,  # type: ignore[arg-type]
            devices=devices, load_format=load_format,  # type: ignore[arg-type]
        )  # fmt: skip
        prepared = prepare_model(str(model), needs_weights=load_format != "dummy")
        prompts = more.pop("prompts", None) or zoo.prompts(prepared.config.vocab_size)
        certificate = verify(prepared, config, prompts, pool=self._pool, **more)
        kept = {"model": name or Path(model).name, "devices": devices}
        self.certificates.append(asdict(certificate) | kept)
        assert certificate.is_same, certificate
        assert certificate.device == "cuda"
        return certificate


@pytest.fixture(scope="session")
def check(pool: WorkerPool) -> Iterator[Checker]:
    checker = Checker(pool)
    yield checker
    path = os.environ.get("BIREME_GPU_RESULTS")
    if path:
        result = {"environment": _environment(), "certificates": checker.certificates}
        kept, worker = Path(path), os.environ.get("PYTEST_XDIST_WORKER")
        kept = kept.with_stem(f"{kept.stem}-{worker}") if worker else kept
        kept.write_text(json.dumps(result, indent=1) + "\n")


@pytest.fixture(scope="session")
def pair() -> tuple[int, int]:
    """Devices of two ranks: two GPUs, or one that NCCL was told to share."""
    if torch.cuda.device_count() > 1:
        return 0, 1
    if os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1":
        return 0, 0
    pytest.skip("needs two CUDA devices, or NCCL 2.30 with NCCL_MULTI_RANK_GPU_ENABLE=1")


@pytest.fixture(scope="session")
def peers(pair: tuple[int, int]) -> tuple[int, int]:
    """Devices of two ranks that write each other's memory."""
    if pair[0] == pair[1] and os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES") != "1":
        pytest.skip("one GPU is shared; needs TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1 too")
    return pair


@pytest.fixture(scope="session", params=list(zoo.CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint of each family."""
    return zoo.write(
        zoo.CASES[request.param], tmp_path_factory.getbasetemp() / "zoo" / request.param
    )
