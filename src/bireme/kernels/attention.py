"""Reference attention over a paged cache, on torch SDPA.

Shapes: T query tokens, C context tokens, H query heads, K KV heads, D head size, B sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bireme.kernels.functional import softcap


def attention_bias(
    query_positions: torch.Tensor, num_context: int, window: int | None, slopes: torch.Tensor | None
) -> torch.Tensor:
    """What is added to the scores: -inf where a query may not look, ALiBi elsewhere.

    query_positions [B, T] -> [B, 1 or H, T, C]; slopes [H] (ALiBi, arXiv:2108.12409).
    """
    keys = torch.arange(num_context, device=query_positions.device)
    distance = query_positions.unsqueeze(-1) - keys  # [B, T, C]
    is_hidden = distance < 0
    if window is not None:
        is_hidden = is_hidden | (distance >= window)
    bias = torch.zeros(distance.shape, device=distance.device).masked_fill_(
        is_hidden, float("-inf")
    )
    if slopes is None:
        return bias.unsqueeze(1)
    return bias.unsqueeze(1) - slopes.view(1, -1, 1, 1) * distance.unsqueeze(1)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    scale: float,
    cap: float | None = None,
) -> torch.Tensor:
    """softmax(q k^T * scale + bias) v. q, k, v [B, H, T or C, D] -> [B, H, T, D].

    `cap` caps the scores softly before the bias, which SDPA cannot; then it is spelled out.
    """
    if cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=scale)
    scores = softcap(q @ k.transpose(-1, -2) * scale, cap) + bias.to(q.dtype)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v
