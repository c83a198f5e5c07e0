"""The one place that chooses between a kernel's torch reference and its Triton version."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch


@cache
def _is_triton_there() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def is_hopper(device: torch.device) -> bool:
    """True for GPUs of Hopper or later: they chain kernels, and hold several blocks of a weight in shared memory."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def has_kernels(device: torch.device) -> bool:
    """True where the Triton versions run: on CUDA devices, where Triton is installed."""
    return device.type == "cuda" and _is_triton_there()
