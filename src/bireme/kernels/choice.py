"""The one place that chooses between a kernel's torch reference and its version in Triton, or in C for CPUs."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from functools import cache

import torch

from bireme.kernels.cpu.library import KINDS, library

MULTIPROCESSORS = 132  # of a Hopper GPU, for which blocks and parts are chosen
_SHARED = 1 << 15  # elements that torch divides among threads, and the kernels in C do not
_SHARED_KEYS = 1 << 20


@cache
def is_triton_there() -> bool:
    """With a C compiler, which it builds the launchers of kernels with."""
    if importlib.util.find_spec("triton") is None:
        return False
    if "CC" in os.environ or shutil.which("gcc") or shutil.which("clang"):
        return True
    logging.getLogger(__name__).warning(
        "no C compiler for Triton (gcc, clang, or what CC names): GPUs run torch's kernels, which is slower"
    )
    return False


@cache
def is_hopper(device: torch.device) -> bool:
    """True for GPUs of Hopper and of the data centre's Blackwell: they chain kernels, and hold several blocks of a
    weight in shared memory, of which a program can have 227 KiB (99 on other Blackwells)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


def has_kernels(device: torch.device) -> bool:
    """True where the Triton versions run: on CUDA devices, where Triton and a C compiler are installed."""
    return device.type == "cuda" and is_triton_there()


def suits_c(x: torch.Tensor) -> bool:
    """True where the version in C is there for x, and as fast: torch's has one thread too, or would not divide so
    little. It depends on nothing but x's size and the rank's threads, so that a tile of rows always goes the same way.
    """
    return _is_known_to_c(x) and (x.numel() <= _SHARED or torch.get_num_threads() == 1)


def suits_c_attention(q: torch.Tensor, num_keys: int) -> bool:
    """The same of attention of one new token a sequence, q [..., D], which reads `num_keys` elements of keys."""
    is_alone = num_keys <= _SHARED_KEYS or torch.get_num_threads() == 1
    return _is_known_to_c(q) and q.shape[-1] % 16 == 0 and is_alone


def _is_known_to_c(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in KINDS and library() is not None
