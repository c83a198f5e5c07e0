"""Products of a few rows by a weight, which take little longer than the weight takes to be read.

Each program streams some rows of the weight, or some inputs of them, past all rows of x once. The sizes of blocks are
those that read fastest on an H200, over the shapes of models of 7B and 70B, whole and halved.
Shapes: T rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bireme.kernels.choice import MULTIPROCESSORS
from bireme.kernels.gpu.chain import await_before, chained

MOST_ROWS = 64  # beyond which cuBLAS is as fast
_SURELY_ROWS = 32  # up to which it is slower whatever the weight's shape
_HELD_INPUTS = 128  # for whose weights there are registers
_HELD_ROWS = 16  # beyond which registers for them cost as much as they save
_SHARED_BYTES = 228 << 10  # of a multiprocessor
_RESERVED_BYTES = 1 << 10  # of them, a program
_BUSY = 0.9  # share of multiprocessors, of which more does not matter
_NEARLY_BUSY = 0.7
_MOST_PARTS = 4
_MOST_AT_ONCE = 3  # programs of a multiprocessor
_FEWEST_STAGES = 3
_FEW_INPUTS = 4096


@triton.jit
def _silu_mul(gate, up, dtype: tl.constexpr):
    """Rounded where the separate steps round."""
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype)
    return (gate / (1.0 + tl.exp(-gate))).to(dtype) * up


@triton.jit
def _late(x, IS_CHAINED: tl.constexpr):
    """The same 16-bit values, that nothing is made of before what stands before is over."""
    if not IS_CHAINED:
        return x
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
    )


@triton.jit
def one_row_kernel(
    x, weight, bias, out, N, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IS_GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """`weight` [N, K], or [2 N, K] of a gate and what it gates. What the first inputs are multiplied by is read into
    registers while the kernel before still runs."""
    n, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    is_output = n < N
    at_weight = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    is_first = is_output[:, None] & (k < K)[None, :]
    first = tl.load(at_weight, mask=is_first, other=0.0)
    if IS_GATED:
        first_up = tl.load(at_weight + N.to(tl.int64) * K, mask=is_first, other=0.0)
    await_before(IS_CHAINED)
    value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    sums = _late(first, IS_CHAINED).to(tl.float32) * value
    if IS_GATED:
        ups = _late(first_up, IS_CHAINED).to(tl.float32) * value
    for at in range(BLOCK_K, K, BLOCK_K):
        is_input = at + k < K
        mask = is_output[:, None] & is_input[None, :]
        value = tl.load(x + at + k, mask=is_input, other=0.0).to(tl.float32)[None, :]
        rows = tl.load(at_weight + at, mask=mask, other=0.0)
        sums += rows.to(tl.float32) * value
        if IS_GATED:
            rows = tl.load(at_weight + at + N.to(tl.int64) * K, mask=mask, other=0.0)
            ups += rows.to(tl.float32) * value
    result = tl.sum(sums, 1)
    if HAS_BIAS:
        result += tl.load(bias + n, mask=is_output, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    if IS_GATED:
        tl.store(out + n, _silu_mul(result, tl.sum(ups, 1), dtype), mask=is_output)
    else:
        tl.store(out + n, result.to(dtype), mask=is_output)


@triton.jit(do_not_specialize=["T"])
def few_rows_kernel(
    x, weight, bias, out, T, N, K, x_stride,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HELD: tl.constexpr,
    IS_GATED: tl.constexpr, HAS_BIAS: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """The same for T rows; outputs are the rows of the product, for the weight has more of them. What HELD inputs are
    multiplied by is read into registers while the kernel before still runs, and multiplied last. Programs share the
    inputs by their second number: into `out` [P, T, N] of as many parts."""
    part, share = tl.program_id(1), tl.cdiv(tl.cdiv(K, tl.num_programs(1)), BLOCK_K) * BLOCK_K
    start, stop = part * share, tl.minimum(K, part * share + share)
    n, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    t = tl.arange(0, BLOCK_T)
    is_output, is_row = (n < N)[:, None], (t < T)[:, None]
    at_weight = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    at_x = x + t[:, None] * x_stride + k[None, :]
    if HELD > 0:
        f = start + tl.arange(0, HELD)[None, :]
        is_first = f < stop
        at_first = weight + n.to(tl.int64)[:, None] * K + f
        first = tl.load(at_first, mask=is_output & is_first, other=0.0)
        if IS_GATED:
            first_up = tl.load(at_first + N.to(tl.int64) * K, mask=is_output & is_first, other=0.0)
    await_before(IS_CHAINED)
    if HELD > 0:
        first_x = tl.load(x + t[:, None] * x_stride + f, mask=is_row & is_first, other=0.0)
    sums = tl.zeros([BLOCK_N, BLOCK_T], dtype=tl.float32)
    ups = tl.zeros([BLOCK_N, BLOCK_T], dtype=tl.float32)
    for at in range(start + HELD, stop, BLOCK_K):
        is_input = (at + k < stop)[None, :]
        rows = tl.load(at_weight + at, mask=is_output & is_input, other=0.0)
        values = tl.trans(tl.load(at_x + at, mask=is_row & is_input, other=0.0))
        sums = tl.dot(rows, values, sums, input_precision="ieee")
        if IS_GATED:
            rows = tl.load(
                at_weight + at + N.to(tl.int64) * K, mask=is_output & is_input, other=0.0
            )
            ups = tl.dot(rows, values, ups, input_precision="ieee")
    if HELD > 0:
        values = tl.trans(_late(first_x, IS_CHAINED))
        sums = tl.dot(_late(first, IS_CHAINED), values, sums, input_precision="ieee")
        if IS_GATED:
            ups = tl.dot(_late(first_up, IS_CHAINED), values, ups, input_precision="ieee")
    if HAS_BIAS:
        sums += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    dtype: tl.constexpr = out.dtype.element_ty
    result = sums.to(dtype)
    if IS_GATED:
        result = _silu_mul(sums, ups, dtype)
    row = (part * T + t)[None, :]
    tl.store(out + row * N + n[:, None], result, mask=is_output & (t < T)[None, :])


def suits(
    x: torch.Tensor, weight: torch.Tensor, *, is_gated: bool = False, in_parts: bool = False
) -> bool:
    """Whether these kernels are for x [T, K] and weight [N, K]. Of many rows they are for products whose activation
    they save a kernel of its own, and for those that give all multiprocessors work: cuBLAS parts others by inputs, as
    they do where whoever reads them takes parts."""
    parts = num_parts(len(x), *weight.shape) if in_parts else 1
    has_work = is_gated or _busy(len(weight), 64, parts) > _BUSY
    return (
        x.dim() == 2
        and 0 < len(x) <= (MOST_ROWS if has_work else _SURELY_ROWS)
        and x.dtype == weight.dtype
        and x.element_size() == 2
        and x.stride(1) == 1
        and weight.is_contiguous()
    )


def block_rows(num_rows: int) -> int:
    """That a kernel is compiled for."""
    return max(16, int(triton.next_power_of_2(num_rows)))


def held_inputs(num_rows: int) -> int:
    """Whose weights are read before the kernel before is over."""
    return _HELD_INPUTS if num_rows <= _HELD_ROWS else 0


def num_parts(num_rows: int, num_outputs: int, num_inputs: int) -> int:
    """One where that gives all multiprocessors work; else as below, without parts that have no inputs."""
    if num_rows == 1 or _busy(num_outputs, 64) > _BUSY:
        return 1
    share = triton.cdiv(triton.cdiv(num_inputs, _wanted_parts(num_rows, num_outputs)), 128) * 128
    return int(triton.cdiv(num_inputs, share))


def _wanted_parts(num_rows: int, num_outputs: int) -> int:
    """Of so few rows that their sums are soon read, as many as programs that run at once; of more the fewest that give
    nearly all multiprocessors work."""
    blocks = int(triton.cdiv(num_outputs, 64))
    if num_rows <= _HELD_ROWS:
        return max(1, min(_MOST_PARTS, _MOST_AT_ONCE * MULTIPROCESSORS // blocks))
    least = _BUSY * MULTIPROCESSORS
    enough = (
        parts
        for parts in range(1, _MOST_PARTS)
        if blocks * parts >= least and _busy(num_outputs, 64, parts) >= _NEARLY_BUSY
    )
    return next(enough, _MOST_PARTS)


def _busy(num_outputs: int, block: int, parts: int = 1) -> float:
    """The share of multiprocessors that have a program, while the last ones run too."""
    programs = triton.cdiv(num_outputs, block) * parts
    return float(programs / (MULTIPROCESSORS * triton.cdiv(programs, MULTIPROCESSORS)))


def block_sizes(
    num_rows: int, weight: torch.Tensor, *, is_gated: bool, parts: int
) -> dict[str, int]:
    """Sizes of blocks, and how they are pipelined."""
    num_outputs = len(weight) // 2 if is_gated else len(weight)
    at_once = int(triton.cdiv(triton.cdiv(num_outputs, 64) * parts, MULTIPROCESSORS))
    if is_gated and weight.shape[1] <= _FEW_INPUTS:  # soon over, so that what begins soon is best
        stages = 6 if at_once == 1 else 4
        return {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": stages}
    if parts == 1 and num_rows > _SURELY_ROWS and _busy(num_outputs, 128) >= _busy(num_outputs, 64):
        block_k = 64 if is_gated else 128
        return {"BLOCK_N": 128, "BLOCK_K": block_k, "num_warps": 8, "num_stages": 4}
    stages = _stages(num_rows, at_once, is_gated=is_gated)
    return {"BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": stages}


def _stages(num_rows: int, at_once: int, *, is_gated: bool) -> int:
    """As many as leave room for all programs of a multiprocessor at once, if that is enough for each."""
    most, num_weights = (4, 2) if is_gated else (6, 1)
    stage_bytes = 2 * 128 * (64 * num_weights + block_rows(num_rows))  # of weights and x
    fitting = (_SHARED_BYTES // at_once - _RESERVED_BYTES) // stage_bytes
    return min(most, fitting) if at_once <= _MOST_AT_ONCE and fitting >= _FEWEST_STAGES else most


def few_rows_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x W^T + b: [T, K] by [N, K] -> [T, N]"""
    return _product(x, weight, bias, is_gated=False)


def few_rows_parts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same as a sum that is not made: [T, K] by [N, K] -> float32 [P, T, N], or [T, N] where one part is best"""
    parts = num_parts(len(x), *weight.shape)
    return _product(x, weight, None, is_gated=False, parts=parts)


def few_rows_gated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """silu(x G^T) * (x U^T), G over U in the weight: [T, K] by [2 N, K] -> [T, N]"""
    return _product(x, weight, None, is_gated=True)


def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    is_gated: bool,
    parts: int = 1,
) -> torch.Tensor:
    num_rows, num_inputs = x.shape
    num_outputs = len(weight) // 2 if is_gated else len(weight)
    out = x.new_empty(num_rows, num_outputs)
    if parts > 1:
        out = x.new_empty(parts, num_rows, num_outputs, dtype=torch.float32)
    given_bias = bias if bias is not None else weight
    flags = {"IS_GATED": is_gated, "HAS_BIAS": bias is not None, **chained(x)}
    if num_rows == 1:
        one_row_kernel[(triton.cdiv(num_outputs, 4),)](
            x, weight, given_bias, out, num_outputs, num_inputs,
            BLOCK_N=4, BLOCK_K=1024, **flags, num_warps=4 if is_gated else 2,
        )  # fmt: skip
        return out
    blocks = block_sizes(num_rows, weight, is_gated=is_gated, parts=parts)
    few_rows_kernel[(triton.cdiv(num_outputs, blocks["BLOCK_N"]), parts)](
        x, weight, given_bias, out, num_rows, num_outputs, num_inputs, x.stride(0),
        BLOCK_T=block_rows(num_rows), HELD=held_inputs(num_rows), **blocks, **flags,
    )  # fmt: skip
    return out
