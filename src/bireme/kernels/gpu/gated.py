"""The activation of a gated MLP: silu(gate) * up. Shapes: T tokens, F columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bireme.kernels.gpu.chain import await_before, chained

_BLOCK = 1024


@triton.jit
def silu_mul_kernel(h, out, F, BLOCK: tl.constexpr, IS_CHAINED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < F
    await_before(IS_CHAINED)
    gate = tl.load(h + row * 2 * F + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h + row * 2 * F + F + at, mask=inside, other=0.0)
    gate = (gate / (1.0 + tl.exp(-gate))).to(up.dtype)
    tl.store(out + row * F + at, gate * up, mask=inside)


def silu_mul(h: torch.Tensor) -> torch.Tensor:
    """[T, 2 F], gate before up -> [T, F]"""
    columns = h.shape[1] // 2
    out = h.new_empty(len(h), columns)
    silu_mul_kernel[(len(h), triton.cdiv(columns, _BLOCK))](
        h, out, columns, BLOCK=_BLOCK, **chained(h)
    )
    return out
