"""RMSNorm of rows, with the residual's addition before it. Shapes: T tokens, D elements."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bireme.kernels.gpu.chain import await_before, chained
from bireme.kernels.gpu.parts import summed


@triton.jit
def rms_norm_kernel(
    x, delta, weight, total, out, apart, eps, offset,
    D: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, HAS_OFFSET: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """PARTS of `delta`, `apart` elements from one another; 0: nothing is added."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    inside = at < D
    scale = tl.load(weight + at, mask=inside, other=0.0)
    if PARTS > 0:
        # from where all multiprocessors write to: in this one's own cache an older value may be
        value = tl.load(x + row * D + at, mask=inside, other=0.0, cache_modifier=".cg")
    await_before(IS_CHAINED)
    if PARTS == 0:
        value = tl.load(x + row * D + at, mask=inside, other=0.0)
    else:
        value = value + summed(delta + row * D + at, inside, apart, PARTS, value.dtype)
        tl.store(total + row * D + at, value, mask=inside)
    y = value.to(tl.float32)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / D + eps)
    dtype = out.dtype.element_ty
    normed = y.to(dtype) * scale  # rounded before it is scaled, as models were trained
    if HAS_OFFSET:
        normed = (y * (scale.to(tl.float32) + offset)).to(dtype)
    tl.store(out + row * D + at, normed, mask=inside)


def _num_warps(size: int) -> int:
    return max(1, min(16, size // 256))


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> torch.Tensor:
    """[..., D] -> [..., D]"""
    x = x.contiguous()
    out = torch.empty_like(x)
    size = triton.next_power_of_2(x.shape[-1])
    rms_norm_kernel[(x.numel() // x.shape[-1],)](
        x, x, weight, x, out, 0, eps, offset,
        D=x.shape[-1], SIZE=size, PARTS=0, HAS_OFFSET=offset != 0, num_warps=_num_warps(size),
        **chained(x),
    )  # fmt: skip
    return out


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + delta [T, D], and its norm; delta may be in parts, float32 [P, T, D]. x is not of the kernel right before,
    but of an earlier one: it is read while that one still runs."""
    x, delta = x.contiguous(), delta.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    size = triton.next_power_of_2(x.shape[-1])
    rms_norm_kernel[(len(x),)](
        x, delta, weight, total, out, x.numel(), eps, offset,
        D=x.shape[-1], SIZE=size, PARTS=delta.numel() // x.numel(), HAS_OFFSET=offset != 0, num_warps=_num_warps(size),
        **chained(x),
    )  # fmt: skip
    return total, out
