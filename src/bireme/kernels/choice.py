"""The one place that chooses between a kernel's torch reference and its version in Triton, or in C for CPUs."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

from bireme.kernels.cpu.library import KINDS, library

_SHARED = 1 << 15  # elements that torch divides among threads, and the kernels in C do not


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


def suits_c(x: torch.Tensor, most_elements: int = _SHARED) -> bool:
    """True where the version in C is there for x, and is as fast: torch's has one thread too, or is given no more than
    `most_elements`."""
    is_known = x.device.type == "cpu" and x.dtype in KINDS
    is_alone = is_known and (x.numel() <= most_elements or torch.get_num_threads() == 1)
    return is_alone and library() is not None
