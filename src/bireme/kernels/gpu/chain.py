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
    """Before it nothing may be read that a kernel of the chain, or the one right before it, wrote, and nothing be
    written. Every kernel that is launched chained calls it: then all kernels before are over, and not the last one
    alone. The next one may be launched before that: all programs of this one are there by then, so that it cannot keep
    one out."""
    if IS_CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(at, num_bytes):
    """Has the device's cache fetch so many bytes from each address on, both multiples of 16."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;", "=r,l,r",
        [at.to(tl.int64), num_bytes], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


def chained(x: torch.Tensor) -> dict[str, Any]:
    """How a kernel of the rows x is launched."""
    if len(x) > MOST_ROWS or not is_hopper(x.device):
        return {"IS_CHAINED": False}
    return {"IS_CHAINED": True, "launch_pdl": True}
