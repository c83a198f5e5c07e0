"""Chooses the next ids from logits that are cut by vocabulary; no rank ever sees all of them.

Top-k and top-p are thresholds, found by radix selection: three reductions of histograms. Masses
are integers, so that their sums do not depend on how the vocabulary is cut.
Shapes: S sampled rows, V local vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bireme.kernels.noise import gumbel_noise
from bireme.parallel.mesh import TensorGroup

_RADIX = ((21, 11), (10, 11), (0, 10))  # (shift, bits) from the top of a 32-bit key
_MASS_ONE = 2.0**31


@dataclass(frozen=True)
class SamplingRows:
    """What each row asks for: tensors [S]; temperature 0 is greedy, top_k 0 keeps all.

    `is_random` and `is_filtered` say on the host whether any row draws or filters.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    is_random: bool
    is_filtered: bool


def sample(
    logits: torch.Tensor, first_id: int, rows: SamplingRows, group: TensorGroup
) -> torch.Tensor:
    """int64 [S], the same on every rank of the group. logits float32 [S, V], -inf on padding."""
    scores = logits
    if rows.is_random:
        is_greedy = rows.temperature == 0
        scaled = logits / rows.temperature.masked_fill(is_greedy, 1).unsqueeze(1)
        if rows.is_filtered:
            scaled = scaled.masked_fill(_is_filtered_out(scaled, rows, group), float("-inf"))
        ids = torch.arange(first_id, first_id + logits.shape[1], device=logits.device)
        noise = gumbel_noise(rows.seeds, torch.zeros_like(rows.seeds), rows.positions, ids)
        scores = torch.where(is_greedy.unsqueeze(1), logits.double(), scaled.double() + noise)
    best, at = scores.max(dim=1)
    mine = torch.stack((best.double(), (at + first_id).double()))
    everyone = group.all_gather(mine)  # [tp, 2, S]; ids are exact in float64
    winner = everyone[:, 0].argmax(dim=0, keepdim=True)
    return everyone[:, 1].gather(0, winner).squeeze(0).long()


def _is_filtered_out(scaled: torch.Tensor, rows: SamplingRows, group: TensorGroup) -> torch.Tensor:
    """bool [S, V]: top-k first, then top-p of what is left."""
    keys = _sortable(scaled)
    top = group.all_gather(scaled.max(dim=1).values).amax(dim=0)
    ones = torch.isfinite(scaled).long()
    k = torch.where(rows.top_k > 0, rows.top_k, torch.iinfo(torch.int32).max)
    keys_kept = keys >= _threshold(
        keys, ones, lambda total: torch.minimum(k, total), group
    ).unsqueeze(1)
    mass = (torch.exp(scaled - top.unsqueeze(1)).double() * _MASS_ONE).long() * keys_kept
    p = rows.top_p.double()
    wanted = _threshold(
        keys, mass, lambda total: (total.double() * p).ceil().long().clamp(min=1), group
    )
    return ~(keys_kept & (keys >= wanted.unsqueeze(1)))


def _sortable(x: torch.Tensor) -> torch.Tensor:
    """int64 keys in [0, 2^32) in the order of float32 `x`."""
    bits = x.contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -1 - bits, bits + 2**31)


def _threshold(
    keys: torch.Tensor,
    weights: torch.Tensor,
    target_of: Callable[[torch.Tensor], torch.Tensor],
    group: TensorGroup,
) -> torch.Tensor:
    """int64 [S]: the largest key such that the weights of keys at or above it reach the target.

    `target_of(total)` gives the target from the total weight, both int64 [S].
    """
    num_rows = keys.shape[0]
    prefix = torch.zeros(num_rows, dtype=torch.int64, device=keys.device)
    target = prefix
    for shift, bits in _RADIX:
        size = 1 << bits
        is_inside = (keys >> (shift + bits)) == (prefix >> (shift + bits)).unsqueeze(1)
        histogram = torch.zeros(num_rows, size, dtype=torch.int64, device=keys.device)
        histogram.scatter_add_(1, (keys >> shift) & (size - 1), weights * is_inside)
        group.all_reduce(histogram)
        above = histogram.flip(1).cumsum(1).flip(1)  # weight in this bin and all higher ones
        if shift == _RADIX[0][0]:
            target = target_of(above[:, 0])
        chosen = (above >= target.unsqueeze(1)).sum(dim=1, keepdim=True) - 1
        chosen = chosen.clamp(min=0)
        target = target - (above.gather(1, chosen) - histogram.gather(1, chosen)).squeeze(1)
        prefix = prefix | (chosen.squeeze(1) << shift)
    return prefix
