"""Chooses the next ids from logits that are cut by vocabulary; no rank ever sees all of them.

Top-k and top-p are thresholds, found by radix selection: three reductions of histograms. Masses
are integers, so that their sums do not depend on how the vocabulary is cut.
Shapes: S sampled rows, V local vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bireme.kernels.noise import gumbel_noise
from bireme.parallel.mesh import TensorGroup

_RADIX = ((21, 11), (10, 11), (0, 10))  # (shift, bits) from the top of a 32-bit key
_MASS_ONE = 2.0**31
_BYTES_PER_LOGIT = 64  # of temporaries while a row is drawn: eight of 8 bytes


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
    logits: torch.Tensor,
    first_id: int,
    rows: SamplingRows,
    group: TensorGroup,
    workspace_bytes: int,
) -> torch.Tensor:
    """int64 [S], the same on every rank of the group. logits float32 [S, V], -inf on padding.

    The vocabulary is gone through in tiles, so that temporaries stay within `workspace_bytes`.
    """
    width = max(1, workspace_bytes // (_BYTES_PER_LOGIT * logits.shape[0]))
    tiles = [(at, logits[:, at : at + width]) for at in range(0, logits.shape[1], width)]
    lowest_key = _lowest_key([tile for _, tile in tiles], rows, group) if rows.is_filtered else None
    best = [
        torch.stack((value.double(), (at + first_id + index).double()))  # exact in float64
        for at, tile in tiles
        for value, index in [_scores(tile, first_id + at, rows, lowest_key).max(dim=1)]
    ]
    everyone = group.all_gather(_first_best(torch.stack(best)))  # [tp, 2, S]
    return _first_best(everyone)[1].long()


def _first_best(candidates: torch.Tensor) -> torch.Tensor:
    """[N, 2, S] of (score, id) -> [2, S]: the highest score, the first of equals."""
    winner = candidates[:, :1].argmax(dim=0, keepdim=True).expand(-1, 2, -1)
    return candidates.gather(0, winner).squeeze(0)


def _scores(
    logits: torch.Tensor, first_id: int, rows: SamplingRows, lowest_key: torch.Tensor | None
) -> torch.Tensor:
    """[S, V] whose largest element is the choice: logits, or tempered ones with noise added."""
    if not rows.is_random:
        return logits
    scaled = _tempered(logits, rows)
    if lowest_key is not None:
        scaled.masked_fill_(_sortable(scaled) < lowest_key.unsqueeze(1), float("-inf"))
    ids = torch.arange(first_id, first_id + logits.shape[1], device=logits.device)
    noise = gumbel_noise(rows.seeds, torch.zeros_like(rows.seeds), rows.positions, ids)
    is_greedy = (rows.temperature == 0).unsqueeze(1)
    return torch.where(is_greedy, logits.double(), scaled.double() + noise)


def _tempered(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    return logits / rows.temperature.masked_fill(rows.temperature == 0, 1).unsqueeze(1)


def _lowest_key(
    tiles: Sequence[torch.Tensor], rows: SamplingRows, group: TensorGroup
) -> torch.Tensor:
    """int64 [S]: the least key that stays: top-k first, then top-p of what is left."""
    highest = torch.stack([_tempered(tile, rows).max(dim=1).values for tile in tiles]).amax(dim=0)
    top = group.all_gather(highest).amax(dim=0).unsqueeze(1)
    k = torch.where(rows.top_k > 0, rows.top_k, torch.iinfo(torch.int32).max)

    def count(scaled: torch.Tensor, _keys: torch.Tensor) -> torch.Tensor:
        return torch.isfinite(scaled).long()

    by_count = _threshold(tiles, rows, count, lambda total: torch.minimum(k, total), group)

    def mass(scaled: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        share = (torch.exp(scaled - top).double() * _MASS_ONE).long()
        return share * (keys >= by_count.unsqueeze(1))

    def wanted(total: torch.Tensor) -> torch.Tensor:
        return (total.double() * rows.top_p.double()).ceil().long().clamp(min=1)

    by_mass = _threshold(tiles, rows, mass, wanted, group)
    return torch.maximum(by_count, by_mass.masked_fill(rows.top_p >= 1, 0))


def _sortable(x: torch.Tensor) -> torch.Tensor:
    """int64 keys in [0, 2^32) in the order of float32 `x`."""
    bits = x.contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -1 - bits, bits + 2**31)


def _threshold(
    tiles: Sequence[torch.Tensor],
    rows: SamplingRows,
    weights_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    target_of: Callable[[torch.Tensor], torch.Tensor],
    group: TensorGroup,
) -> torch.Tensor:
    """int64 [S]: the largest key such that the weights of keys at or above it reach the target.

    `weights_of(scaled, keys)` gives weights of a tile, int64 [S, V]; `target_of(total)` the target
    from the total weight, both int64 [S].
    """
    prefix = torch.zeros_like(rows.seeds)
    target = prefix
    for shift, bits in _RADIX:
        histogram = _histogram(tiles, rows, weights_of, prefix, shift, bits)
        group.all_reduce(histogram)
        above = histogram.flip(1).cumsum(1).flip(1)  # weight in this bin and all higher ones
        if shift == _RADIX[0][0]:
            target = target_of(above[:, 0])
        chosen = (above >= target.unsqueeze(1)).sum(dim=1, keepdim=True) - 1
        chosen = chosen.clamp(min=0)
        target = target - (above.gather(1, chosen) - histogram.gather(1, chosen)).squeeze(1)
        prefix = prefix | (chosen.squeeze(1) << shift)
    return prefix


def _histogram(
    tiles: Sequence[torch.Tensor],
    rows: SamplingRows,
    weights_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    prefix: torch.Tensor,
    shift: int,
    bits: int,
) -> torch.Tensor:
    """int64 [S, 2^bits]: the weight of the keys that begin with `prefix`, by their next bits."""
    size = 1 << bits
    histogram = prefix.new_zeros(len(prefix), size)
    begins = (prefix >> (shift + bits)).unsqueeze(1)
    for tile in tiles:
        scaled = _tempered(tile, rows)
        keys = _sortable(scaled)
        weights = weights_of(scaled, keys) * ((keys >> (shift + bits)) == begins)
        histogram.scatter_add_(1, (keys >> shift) & (size - 1), weights)
    return histogram
