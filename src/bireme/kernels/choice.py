"""The one place that chooses between a kernel's torch reference and its Triton version."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

_INTERPRETED = "TRITON_INTERPRET"  # Triton's own variable: kernels run on a CPU, for tests


@cache
def _is_triton_there() -> bool:
    return importlib.util.find_spec("triton") is not None


def runs_on_gpu(x: torch.Tensor) -> bool:
    """True where the Triton version is to run for a tensor."""
    return (x.is_cuda or os.environ.get(_INTERPRETED) == "1") and _is_triton_there()
