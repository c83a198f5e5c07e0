"""Kernels that are launched while the one before still runs, and wait for its end themselves.

What a launch costs is over by then: programmatic dependent launch, on Hopper and later; in a CUDA graph the same.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from bireme.kernels.choice import is_hopper

MOST_ROWS = 64  # of more, kernels take so long that it gains little


@triton.jit
def await_before(IS_CHAINED: tl.constexpr):
    """Before it nothing may be read that the kernel before may write, and nothing be written. Every kernel that is
    launched chained calls it: then all kernels before are over, and not the last one alone."""
    if IS_CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def chained(x: torch.Tensor) -> dict[str, Any]:
    """How a kernel of the rows x is launched."""
    if len(x) > MOST_ROWS or not is_hopper(x.device):
        return {"IS_CHAINED": False}
    return {"IS_CHAINED": True, "launch_pdl": True}
