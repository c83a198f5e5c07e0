"""Attention whose result for a query does not depend, bit by bit, on what else is computed with it.

Every query goes through the places of its context in splits of a fixed size that begin at multiples
of it, one after another (online softmax, arXiv:1805.02867). Shapes of all operations depend on the
number of rows alone; a split in which a query sees nothing leaves it as it was.
Shapes: N rows, H query heads, K KV heads, D head size, S places of a split.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from bireme.kernels.functional import softcap

SPLIT = 32


@dataclass(frozen=True)
class Scoring:
    """How scores are made: their scale, a soft cap, ALiBi slopes [H], and how far queries look."""

    scale: float
    cap: float | None
    slopes: torch.Tensor | None
    window: int | None


def tiled_attention(
    q: torch.Tensor,
    splits: Iterable[tuple[int, torch.Tensor, torch.Tensor]],
    positions: torch.Tensor,
    scoring: Scoring,
) -> torch.Tensor:
    """q [N, H, D] at positions [N] -> [N, H, D].

    `splits` are (first position, keys, values) in ascending order, [N, K or H, S, D] each: H a
    multiple of K, whose queries follow one another.
    """
    queries: torch.Tensor | None = None
    highest = total = out = torch.empty(0)
    for first, keys, values in splits:
        if queries is None:
            queries = q.float().unflatten(1, (keys.shape[1], -1))  # [N, K, H / K, D]
            highest = q.new_full((*queries.shape[:3], 1), float("-inf"), dtype=torch.float32)
            total, out = torch.zeros_like(highest), torch.zeros_like(queries)
        scores = _scores(queries, keys.float(), first, positions, scoring)
        new_highest = torch.maximum(highest, scores.amax(dim=-1, keepdim=True))
        weights = torch.exp(scores - new_highest)
        faded = torch.exp(highest - new_highest)
        is_seen = torch.isfinite(scores).any(dim=-1, keepdim=True)
        new_total = total * faded + weights.sum(dim=-1, keepdim=True)
        total = torch.where(is_seen, new_total, total)
        out = torch.where(is_seen, out * faded + weights @ values.float(), out)
        highest = new_highest
    return (out / total).flatten(1, 2).to(q.dtype)


def _scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    first: int,
    positions: torch.Tensor,
    scoring: Scoring,
) -> torch.Tensor:
    """[N, K, H / K, S], -inf where a query may not look."""
    scores = queries @ keys.transpose(-1, -2) * scoring.scale
    if scoring.cap is not None:
        scores = softcap(scores, scoring.cap)
    places = torch.arange(first, first + keys.shape[2], device=positions.device)
    distance = positions.unsqueeze(1) - places  # [N, S]
    if scoring.slopes is not None:
        slopes = scoring.slopes.view(1, *scores.shape[1:3], 1)
        scores = scores - slopes * distance[:, None, None, :]
    is_hidden = distance < 0
    if scoring.window is not None:
        is_hidden |= distance >= scoring.window
    return scores.masked_fill(is_hidden[:, None, None, :], float("-inf"))
