"""Small functions that every family uses, in plain torch.

Shapes: T tokens, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from bireme.kernels.choice import has_kernels, suits_c
from bireme.kernels.cpu import ops

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> torch.Tensor:
    """x / rms(x) * (weight + offset) over the last dim, in float32 inside."""
    if has_kernels(x.device):
        from bireme.kernels.gpu import norm

        return norm.rms_norm(x, weight, eps, offset)
    if suits_c(x):
        return ops.rms_norm(x, weight, eps, offset)
    return rms_norm_reference(x, weight, eps, offset)


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + delta [T, D], and its norm; delta may be in parts, float32 [P, T, D]."""
    if has_kernels(x.device):
        from bireme.kernels.gpu import norm

        return norm.add_rms_norm(x, delta, weight, eps, offset)
    delta = whole(delta, x.dtype)
    if suits_c(x):
        return ops.add_rms_norm(x, delta, weight, eps, offset)
    total = x + delta
    return total, rms_norm_reference(total, weight, eps, offset)


def whole(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[T, D] of what may be in parts, float32 [P, T, D]."""
    return x if x.dim() == 2 else x.sum(0).to(dtype)


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> torch.Tensor:
    """`rms_norm` in torch."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if offset:
        return (y * (weight.float() + offset)).to(x.dtype)
    return weight * y.to(x.dtype)


def gated(h: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """activation(gate) * up of h [T, 2 F], gate before up -> [T, F]"""
    if activation is F.silu and has_kernels(h.device):
        from bireme.kernels.gpu.gated import silu_mul

        return silu_mul(h)
    if activation is F.silu and suits_c(h):
        return ops.silu_mul(h)
    gate, up = h.chunk(2, dim=-1)
    return activation(gate) * up


def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(x / cap) (Gemma 2, arXiv:2408.00118)."""
    return torch.tanh(x / cap) * cap


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first 2 * cos.shape[-1] elements of each head, halves paired (NeoX order).

    x [T, H, D], cos and sin [T, rotary_dim / 2].
    """
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
    return torch.cat((*turned, rest), dim=-1)


def grouped_linear(x: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows [ends[e - 1], ends[e]) of x times expert e's weight, transposed.

    x [N, in], weights [E, out, in], ends int64 [E] -> [N, out]. In bfloat16 on CUDA without a host
    synchronisation; rows that are no multiple of 16 bytes are multiplied expert by expert.
    """
    if all(size * x.element_size() % 16 == 0 for size in weights.shape[1:]):
        return F.grouped_mm(x, weights.transpose(1, 2), offs=ends.int())
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    parts = zip(x.split(counts), weights, strict=True)
    return torch.cat([F.linear(rows, weight) for rows, weight in parts])
