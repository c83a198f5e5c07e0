"""From projected rows to attention: norms of heads, rotary embedding, and the write to the cache.

Shapes: T tokens, H query heads, K KV heads, D head size, R rotated elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bireme.kernels.gpu.chain import await_before, chained
from bireme.kernels.gpu.parts import summed

_HEADS = 8  # of a program


@triton.jit(do_not_specialize=["num_written"])
def rope_and_write_kernel(
    qkv, cos, sin, q_weight, k_weight, places, keys, values, out, eps, row_stride, apart, num_written,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr,
    HEADS: tl.constexpr, PARTS: tl.constexpr, HAS_NORM: tl.constexpr, KEEPS_KEYS: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    at = tl.arange(0, SIZE)[None, :]
    inside = (at < D) & (head < H + 2 * K)
    is_query, is_rotated = head < H, head < H + K
    # what is read here is made before a layer begins: the kernel before, which projects, makes none of it
    if HAS_NORM:
        of_query = tl.load(q_weight + at, mask=at < D, other=0.0)
        weight = tl.where(is_query, of_query, tl.load(k_weight + at, mask=at < D, other=0.0))
    if HALF > 0:
        # each element's partner lies half of the rotated ones before or behind it
        is_first, in_pair = at < HALF, at < 2 * HALF
        partner = tl.where(is_first, at + HALF, at - HALF)
        angle = tl.where(is_first, at, at - HALF)
        c = tl.load(cos + token * HALF + angle, mask=in_pair, other=1.0)
        s = tl.load(sin + token * HALF + angle, mask=in_pair, other=0.0)
        if HAS_NORM:
            of_query = tl.load(q_weight + partner, mask=in_pair, other=0.0)
            of_key = tl.load(k_weight + partner, mask=in_pair, other=0.0)
            partners_weight = tl.where(is_query, of_query, of_key)
    place = tl.load(places + token, mask=token < num_written, other=0)
    await_before(IS_CHAINED)
    row = qkv + token * row_stride + head * D
    dtype = out.dtype.element_ty
    given = summed(row + at, inside, apart, PARTS, dtype)
    x = given
    scale = 1.0
    if HAS_NORM:
        y = x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(y * y, 1) / D + eps)[:, None]
        x = (y * scale).to(dtype) * weight
    if HALF > 0:
        other = summed(row + partner, inside & in_pair, apart, PARTS, dtype)
        if HAS_NORM:
            other = (other.to(tl.float32) * scale).to(dtype) * partners_weight
        c, s = c.to(tl.float32), s.to(tl.float32)
        s = tl.where(is_first, -s, s)
        x = (x.to(tl.float32) * c + other.to(tl.float32) * s).to(dtype)
    tl.store(out + (token * H + head) * D + at, x, mask=inside & is_query)
    if KEEPS_KEYS:
        tl.debug_barrier()  # their partners have been read
        tl.store(row + at, x, mask=inside & is_rotated & (head >= H))
    if token < num_written:
        to_keys = keys + (place * K + head - H) * D + at
        tl.store(to_keys, x, mask=inside & is_rotated & (head >= H))
        to_values = values + (place * K + head - H - K) * D + at
        tl.store(to_values, given, mask=inside & (head >= H + K))


def rope_and_write(
    qkv: torch.Tensor,
    num_heads: int,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None,
    places: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    keeps_keys: bool = False,
) -> torch.Tensor:
    """Rotates queries and keys of qkv [T, (H + 2 K) * D], writes keys and values to `places` [T] of the
    cache [N, K, D] -> queries [T, H, D].

    qkv may be in parts, float32 [P, T, (H + 2 K) * D]. `rotation` is cos and sin [T, R / 2]; `norms` the weights [D] of
    the heads' RMSNorms, and eps. Rows beyond `places` are not written. `keeps_keys`: keys come to lie in qkv as they do
    in the cache.
    """
    num_kv, head_dim = keys.shape[1:]
    half = 0 if rotation is None else rotation[0].shape[1]
    cos, sin = rotation if rotation is not None else (qkv, qkv)
    q_weight, k_weight, eps = norms if norms is not None else (qkv, qkv, 0.0)
    num_rows, parts = qkv.shape[-2], 1 if qkv.dim() == 2 else len(qkv)
    assert parts == 1 or not keeps_keys, "keys cannot come to lie in parts"
    out = keys.new_empty(num_rows, num_heads, head_dim)
    rope_and_write_kernel[(num_rows, triton.cdiv(num_heads + 2 * num_kv, _HEADS))](
        qkv, cos, sin, q_weight, k_weight, places, keys, values, out, eps, qkv.stride(-2),
        qkv.stride(0), len(places),
        H=num_heads, K=num_kv, D=head_dim, SIZE=triton.next_power_of_2(head_dim), HALF=half,
        HEADS=_HEADS, PARTS=parts, HAS_NORM=norms is not None, KEEPS_KEYS=keeps_keys, num_warps=4,
        **chained(out),
    )  # fmt: skip
    return out
