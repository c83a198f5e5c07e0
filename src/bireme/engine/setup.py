"""How a model runs, for those who look at it from outside: plain Python."""

from __future__ import annotations

import os

import msgspec

_HEEDED = (
    "OMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "MALLOC_", "NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "CUDA_",
    "BIREME_COMPILED_HELPER",
)  # fmt: skip


class RankSetup(msgspec.Struct, frozen=True):
    """A rank, and where it runs; threads are of a CPU rank."""

    name: str
    stage: int
    tp_rank: int
    device: str
    num_threads: int


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """`folder` holds the model's files, if any; `num_cores` are those that this process may use.
    `num_requests` of the longest length fit the KV cache at once; None where there is none."""

    model: str
    folder: str | None
    dtype: str
    transport: str
    ranks: list[RankSetup]
    num_cores: int
    environment: dict[str, str]
    num_requests: float | None = None


def num_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def environment() -> dict[str, str]:
    """The variables that change how ranks run; no other is told."""
    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_HEEDED)}
