"""Reference attention over a paged cache, on torch SDPA.

Shapes: T query tokens, C context tokens, H query heads, K KV heads, D head size, B sequences.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from bireme.kernels.functional import softcap

COPIED_BYTES = 2 << 20  # of keys at most: what a core's cache holds beside a copy


def attention_bias(
    query_positions: torch.Tensor,
    context: tuple[int, int],
    window: int | None,
    slopes: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """What is added to the scores: -inf where a query may not look, ALiBi elsewhere.

    query_positions [B, T], keys at positions [context[0], context[1]) -> [B, 1 or H, T, C];
    slopes [H] (ALiBi, arXiv:2108.12409).
    """
    keys = torch.arange(*context, device=query_positions.device, dtype=torch.int32)
    distance = query_positions.int().unsqueeze(-1) - keys  # [B, T, C]
    is_hidden = distance < 0
    if window is not None:
        is_hidden |= distance >= window
    if slopes is None:
        bias = torch.zeros(distance.shape, dtype=dtype, device=distance.device)
        return bias.masked_fill_(is_hidden, float("-inf")).unsqueeze(1)
    alibi = distance.unsqueeze(1) * -slopes.view(1, -1, 1, 1)
    return alibi.masked_fill_(is_hidden.unsqueeze(1), float("-inf")).to(dtype)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    scale: float,
    cap: float | None = None,
    *,
    is_one_token: bool = False,
) -> torch.Tensor:
    """softmax(q k^T * scale + bias) v. q, k, v [B, H, T or C, D] -> [B, H, T, D].

    `is_one_token`: the T queries are heads of one new token a sequence.

    `cap` caps the scores softly before the bias, which SDPA cannot; then it is spelled out. So it is
    where SDPA takes two to ten times as long.
    """
    if cap is None and not (is_one_token and _is_slow(q, k)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.matmul
    if k.numel() * k.element_size() <= COPIED_BYTES:
        k, v = k.contiguous(), v.contiguous()  # matmul would copy k transposed, which takes longer
    elif q.device.type == "cpu":
        multiply = _matmul_by_head
    scores = multiply(q * scale, k.transpose(-1, -2))  # scaled first: float16 overflows
    scores = (scores if cap is None else softcap(scores, cap)) + bias
    return multiply(torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def _is_slow(q: torch.Tensor, k: torch.Tensor) -> bool:
    """True where SDPA is: on a CPU for one token a sequence in a small type, as measured with AVX-512's bfloat16."""
    if q.device.type != "cpu":
        return False
    if q.dtype == torch.bfloat16:
        return q.shape[2] == 1 or len(q) >= 4 or k.shape[2] >= 1024
    is_copied = k.numel() * k.element_size() <= COPIED_BYTES
    return q.dtype == torch.float16 and q.shape[2] == 1 and is_copied


def _matmul_by_head(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [B, H, M, N] @ b [B, H, N, P], whose heads lie beside each other: one by one none is copied."""
    pairs = zip(a.unbind(), b.unbind(), strict=True)
    found = [x @ y for one, other in pairs for x, y in zip(one, other, strict=True)]
    return torch.stack(found).view(*a.shape[:-1], b.shape[-1])


def grouped_query_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    scale: float,
    cap: float | None = None,
) -> torch.Tensor:
    """`attention` where each KV head serves H / K consecutive query heads, without a copy of it.

    q [B, H, T, D], k and v [B, K, C, D], bias [B, 1, T, C]; B or T is 1 -> [B, H, T, D].
    """
    q = q.unflatten(1, (k.shape[1], -1))  # [B, K, H / K, T, D]
    if q.shape[3] == 1:  # the heads that share a KV head are its queries
        out = attention(q.squeeze(3), k, v, bias, scale, cap, is_one_token=True)
        return out.flatten(1, 2).unsqueeze(2)
    num_shared = q.shape[2]
    k, v = k.expand(num_shared, -1, -1, -1), v.expand(num_shared, -1, -1, -1)
    out = attention(q.squeeze(0).transpose(0, 1), k, v, bias, scale, cap)
    return out.transpose(0, 1).flatten(0, 1).unsqueeze(0)
