"""Products of 17 to 128 rows by a weight, both of which the GPU fetches in blocks by itself.

Where and by which blocks is what was quickest on an H200, over the shapes of models of 7B and 70B, whole and halved,
and of one with 2,880 inputs. Shapes: T rows, K inputs, N outputs, P parts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from bireme.kernels.gpu.chain import await_before, chained
from bireme.kernels.gpu.descriptors import can_be_described, described
from bireme.kernels.gpu.gated import silu_mul_of_sums
from bireme.kernels.gpu.multiprocessors import at_once, busy

_FEWEST_ROWS, _MOST_ROWS = 17, 128
_FEW_ROWS = 64  # beyond which cuBLAS is as quick
_NEARLY_MOST_ROWS = 97  # from which it is not again, in some
_ROWS, _INPUTS = 64, 128  # of a weight's block
_SHARED_BYTES = 212 << 10  # of a multiprocessor, for blocks
_STAGES_BESIDE_OTHERS, _MOST_STAGES = 3, 6


@triton.jit(do_not_specialize=["T"])
def described_rows_kernel(
    x, weight, bias, out, T, N, K,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IS_GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """x [T, K] and `weight` [N, K], or [2 N, K] of a gate and what it gates, described. Outputs are the rows of the
    product, for the weight has more of them. Programs share the inputs by their second number: into `out` [P, T, N] of
    as many parts."""
    part, share = tl.program_id(1), tl.cdiv(tl.cdiv(K, tl.num_programs(1)), BLOCK_K) * BLOCK_K
    start, stop = part * share, tl.minimum(K, part * share + share)
    first = tl.program_id(0) * BLOCK_N
    n, t = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_T)
    await_before(IS_CHAINED)
    sums = tl.zeros([BLOCK_N, BLOCK_T], dtype=tl.float32)
    ups = tl.zeros([BLOCK_N, BLOCK_T], dtype=tl.float32)
    for at in range(start, stop, BLOCK_K):
        rows = weight.load([first, at])
        values = tl.trans(x.load([0, at]))
        sums = tl.dot(rows, values, sums, input_precision="ieee")
        if IS_GATED:
            rows = weight.load([N + first, at])
            ups = tl.dot(rows, values, ups, input_precision="ieee")
    if HAS_BIAS:
        sums += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    dtype: tl.constexpr = out.dtype.element_ty
    result = sums.to(dtype)
    if IS_GATED:
        result = silu_mul_of_sums(sums, ups, dtype)
    row = (part * T + t)[None, :]
    tl.store(out + row * N + n[:, None], result, mask=(n < N)[:, None] & (t < T)[None, :])


def suits(x: torch.Tensor, weight: torch.Tensor, *, is_gated: bool, parts: int) -> bool:
    """Whether this is quicker for x [T, K] and weight [N, K], than `few_rows` up to 64 rows, and than cuBLAS beyond."""
    num_rows = len(x)
    if not _FEWEST_ROWS <= num_rows <= _MOST_ROWS:
        return False
    is_quicker = num_rows >= _NEARLY_MOST_ROWS
    if not is_gated:
        is_alone = at_once(triton.cdiv(len(weight), _ROWS) * parts) == 1
        is_quicker = num_rows <= _FEW_ROWS or (is_quicker and parts > 1 and is_alone)
    return is_quicker and can_be_described(x) and can_be_described(weight)


def block_sizes(num_rows: int, num_outputs: int, *, is_gated: bool, parts: int) -> dict[str, int]:
    """Sizes of blocks, and how they are pipelined."""
    if is_gated:
        wide, narrow = (busy(int(triton.cdiv(num_outputs, size))) for size in (2 * _ROWS, _ROWS))
        if wide >= narrow:
            return {"BLOCK_N": 2 * _ROWS, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}
        return {"BLOCK_N": _ROWS, "BLOCK_K": 64, "num_warps": 8, "num_stages": 6}
    stages = _STAGES_BESIDE_OTHERS
    if at_once(int(triton.cdiv(num_outputs, _ROWS)) * parts) == 1:
        stage_bytes = 2 * _INPUTS * (_ROWS + int(triton.next_power_of_2(num_rows)))
        stages = min(_MOST_STAGES, _SHARED_BYTES // stage_bytes)
    return {"BLOCK_N": _ROWS, "BLOCK_K": _INPUTS, "num_warps": 4, "num_stages": stages}


def multiply_into(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    is_gated: bool,
) -> None:
    """out [T, N], or float32 [P, T, N] of as many parts, of x [T, K]"""
    (num_rows, num_inputs), num_outputs = x.shape, out.shape[-1]
    parts = len(out) if out.dim() == 3 else 1
    blocks: dict[str, Any] = block_sizes(num_rows, num_outputs, is_gated=is_gated, parts=parts)
    block_rows, block_inputs = int(triton.next_power_of_2(num_rows)), blocks["BLOCK_K"]
    described_rows_kernel[(triton.cdiv(num_outputs, blocks["BLOCK_N"]), parts)](
        described(x, [block_rows, block_inputs]),
        described(weight, [blocks["BLOCK_N"], block_inputs]),
        bias if bias is not None else weight, out, num_rows, num_outputs, num_inputs,
        BLOCK_T=block_rows, IS_GATED=is_gated, HAS_BIAS=bias is not None, **blocks, **chained(x),
    )  # fmt: skip
