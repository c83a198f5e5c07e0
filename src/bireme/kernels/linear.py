"""x W^T + b. On a CPU by weights that lie as it multiplies fastest; on a GPU a few rows by kernels of their own.

In a product of few rows oneDNN spends more time on bringing the weight into its own order than on
multiplying; a packed weight is in that order once and for all, and takes no more memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from bireme.kernels.choice import has_kernels, is_hopper
from bireme.kernels.functional import gated

_ROWS = 16  # that the order is chosen for; it serves one row as well as a long prompt


def can_be_packed(weight: torch.Tensor) -> bool:
    """True for a matrix in the memory of a CPU that oneDNN multiplies by in this dtype."""
    if weight.device.type != "cpu" or weight.dim() != 2 or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def pack(weight: torch.Tensor) -> torch.Tensor:
    """The same matrix [out, in], for `linear` alone; `to_dense()` gives it back."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return packed


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """[T, in] -> [T, out] by a plain or packed weight [out, in]."""
    if has_kernels(x.device) and is_hopper(x.device):
        from bireme.kernels.gpu import few_rows

        if few_rows.suits(x, weight):
            return few_rows.few_rows_linear(x, weight, bias)
    if not weight.is_mkldnn:
        return F.linear(x, weight, bias)
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def linear_in_parts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`linear` as a sum that whoever reads it makes: float32 [P, T, out], or [T, out] where that is as quick."""
    if has_kernels(x.device) and is_hopper(x.device):
        from bireme.kernels.gpu import few_rows

        if few_rows.suits(x, weight, in_parts=True):
            return few_rows.few_rows_parts(x, weight)
    return linear(x, weight)


def gated_linear(
    x: torch.Tensor, weight: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """activation(x G^T) * (x U^T): [T, in] by G over U [2 F, in] -> [T, F]"""
    if activation is F.silu and has_kernels(x.device) and is_hopper(x.device):
        from bireme.kernels.gpu import few_rows

        if few_rows.suits(x, weight, is_gated=True):
            return few_rows.few_rows_gated(x, weight)
    return gated(linear(x, weight), activation)
