"""Kernels of `kernels.c` on tensors of one dtype, float32 or bfloat16.

Shapes: T tokens, B sequences, H query heads, K KV heads, D head size, R rotated elements.
"""

from __future__ import annotations

import ctypes

import torch

from bireme.kernels.cpu.library import KINDS, Heads, Library, Scoring, library


def _library() -> Library:
    found = library()
    assert found is not None
    return found


def _are_alike(x: torch.Tensor, *others: torch.Tensor) -> bool:
    return all(other.dtype == x.dtype and other.is_contiguous() for other in others)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """`functional.rms_norm` of x [..., D]."""
    assert _are_alike(x, weight)
    x = x.contiguous()
    out = torch.empty_like(x)
    size = x.shape[-1]
    _library().norm(
        KINDS[x.dtype], x.data_ptr(), None, weight.data_ptr(), None, out.data_ptr(),
        x.numel() // size, size, eps, offset,
    )  # fmt: skip
    return out


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`functional.add_rms_norm` of x and delta [T, D]."""
    x, delta = x.contiguous(), delta.contiguous()
    assert _are_alike(x, delta, weight)
    total, out = torch.empty_like(x), torch.empty_like(x)
    _library().norm(
        KINDS[x.dtype], x.data_ptr(), delta.data_ptr(), weight.data_ptr(), total.data_ptr(),
        out.data_ptr(), len(x), x.shape[1], eps, offset,
    )  # fmt: skip
    return total, out


def silu_mul(h: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of h [T, 2 F], gate before up -> [T, F]"""
    h = h.contiguous()
    size = h.shape[1] // 2
    out = h.new_empty(len(h), size)
    _library().silu_mul(KINDS[h.dtype], h.data_ptr(), out.data_ptr(), len(h), size)
    return out


def rope_and_write(
    qkv: torch.Tensor,
    num_heads: int,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    places: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """Rotates queries and keys of qkv [T, (H + 2 K) * D], writes keys and values to `places` [T] of the
    cache [N, K, D] -> queries [T, H, D].

    `rotation` is cos and sin [T, R / 2], of qkv's dtype. Rows beyond `places` are not written.
    """
    assert places.dtype == torch.int64
    assert _are_alike(qkv, keys, values, *(rotation or ()))
    num_kv, head_dim = keys.shape[1:]
    qkv = qkv.contiguous()
    out = qkv.new_empty(len(qkv), num_heads, head_dim)
    half, cos, sin = 0, None, None
    if rotation is not None:
        half, cos, sin = rotation[0].shape[1], rotation[0].data_ptr(), rotation[1].data_ptr()
    _library().rope_and_write(
        KINDS[qkv.dtype], qkv.data_ptr(), cos, sin, places.data_ptr(), keys.data_ptr(),
        values.data_ptr(), out.data_ptr(), len(qkv), len(places), half,
        ctypes.byref(Heads(num_heads, num_kv, head_dim)),
    )  # fmt: skip
    return out


def decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor,
    positions: torch.Tensor,
    head_map: torch.Tensor,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [B, H, D] -> [B, H, D], of tokens at int64 `positions` [B], whose own keys and values are in the cache
    [N, K, D] already: int64 places [B, C] say where positions from 0 on are, and C is more than any position. Query
    head h reads KV head `head_map[h]`, int32 [H]; D is a multiple of 16; `slopes` are float32 [H].
    """
    assert places.dtype == positions.dtype == torch.int64
    assert head_map.dtype == torch.int32
    assert _are_alike(q, keys, values)
    q, places = q.contiguous(), places.contiguous()
    heads = Heads(q.shape[1], keys.shape[1], q.shape[2])
    scoring = Scoring(scale, cap or 0.0, window or 0, None if slopes is None else slopes.data_ptr())
    code, out = _library(), torch.empty_like(q)
    work = torch.empty(code.attention_floats(ctypes.byref(heads)), dtype=torch.float32)
    code.decode_attention(
        KINDS[q.dtype], q.data_ptr(), keys.data_ptr(), values.data_ptr(), places.data_ptr(),
        places.shape[1], positions.data_ptr(), head_map.data_ptr(), out.data_ptr(), len(q),
        ctypes.byref(heads), ctypes.byref(scoring), work.data_ptr(),
    )  # fmt: skip
    return out
