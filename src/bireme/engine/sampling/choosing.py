"""Chooses the next ids: the likeliest, or a draw among those that the filters keep.

Filters are thresholds. Top-k and top-p find theirs by radix selection: three reductions of
histograms. Masses are integers, so that their sums do not depend on how the vocabulary is cut.
Shapes: S rows of one group, V local vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from bireme.engine.sampling.shard import Shard, sortable
from bireme.kernels.draws import RADIX, Draws
from bireme.kernels.noise import gumbel_noise
from bireme.parallel.mesh import TensorGroup

_MASS_ONE = 2.0**31
_BYTES_PER_LOGIT = 64  # of temporaries while a row is drawn: eight of 8 bytes
_BLOCK = 64  # that every shard's width is a multiple of
_INT32_MIN = torch.iinfo(torch.int32).min


@dataclass(frozen=True)
class RowGroup:
    """Rows that are chosen alike: greedily if `draws` is None. `rows` indexes the logits."""

    rows: torch.Tensor | slice
    draws: Draws | None


def choose(
    logits: torch.Tensor, shard: Shard, groups: Sequence[RowGroup], workspace_bytes: int
) -> torch.Tensor:
    """int64, an id for each row of the logits, the same on every rank; each row is in one group.

    Logits are float32, -inf where an id may not be chosen; the lowest of equals is. The vocabulary
    is gone through in tiles, so that temporaries stay within `workspace_bytes`.
    """
    best = logits.new_empty(2, len(logits), dtype=torch.float64)
    for group in groups:
        if group.draws is None:
            best[:, group.rows] = _best(logits, shard.first_id)[:, group.rows]
        else:
            best[:, group.rows] = _drawn(logits, shard, group.rows, group.draws, workspace_bytes)
    return _first_best(shard.group.all_gather(best))[1].long()


def _best(scores: torch.Tensor, first_id: int) -> torch.Tensor:
    """[S, V] -> float64 [2, S]: the highest score and the first id that has it, which is exact."""
    value, index = _max(scores)
    return torch.stack((value.double(), (first_id + index).double()))


def _max(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`scores.max(dim=1)`, which on a CPU looks at one number after another where it is asked for the place too."""
    if scores.device.type != "cpu" or scores.shape[1] % _BLOCK:
        return scores.max(dim=1)
    blocks = scores.unflatten(1, (-1, _BLOCK))
    value, block = blocks.amax(dim=2).max(dim=1)
    index = blocks[torch.arange(len(scores)), block].argmax(dim=1)
    return value, block * _BLOCK + index


def _first_best(candidates: torch.Tensor) -> torch.Tensor:
    """[N, 2, S] of (score, id) -> [2, S]: the highest score, the first of equals."""
    winner = candidates[:, :1].argmax(dim=0, keepdim=True).expand(-1, 2, -1)
    return candidates.gather(0, winner).squeeze(0)


@dataclass(frozen=True)
class _Tempered:
    """A group's logits over their temperature, tile by tile: (first column, float32 [S, tile])."""

    logits: torch.Tensor
    rows: torch.Tensor | slice
    temperature: torch.Tensor
    width: int

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        for at in range(0, self.logits.shape[1], self.width):
            tile = self.logits[:, at : at + self.width][self.rows]
            yield at, tile / self.temperature.unsqueeze(1)


def _drawn(
    logits: torch.Tensor,
    shard: Shard,
    rows: torch.Tensor | slice,
    draws: Draws,
    workspace_bytes: int,
) -> torch.Tensor:
    """float64 [2, S]: the best score of this shard, with noise added to what is kept, and its id."""
    width = max(1, workspace_bytes // (_BYTES_PER_LOGIT * len(draws.seeds)))
    tiles = _Tempered(logits, rows, draws.temperature, width)
    lowest = _lowest_key(tiles, draws, shard.group) if draws.is_filtered else None
    best = []
    for at, scaled in tiles:
        if lowest is not None:
            scaled.masked_fill_(sortable(scaled) < lowest.unsqueeze(1), float("-inf"))
        first = shard.first_id + at
        ids = torch.arange(first, first + scaled.shape[1], device=logits.device)
        noise = gumbel_noise(draws.seeds, draws.choices, draws.positions, ids)
        best.append(_best(noise.add_(scaled), first))
    return _first_best(torch.stack(best))


def _lowest_key(tiles: _Tempered, draws: Draws, group: TensorGroup) -> torch.Tensor:
    """int32 [S]: the least key that stays: min-p and top-k, then top-p of what they leave."""
    highest = torch.stack([scaled.amax(dim=1) for _, scaled in tiles]).amax(dim=0)
    top = group.all_gather(highest).amax(dim=0)
    lowest = torch.full_like(top, _INT32_MIN, dtype=torch.int32)
    if draws.has_min_p:
        lowest = sortable(top + draws.min_p.log())
    if draws.has_top_k:
        lowest = torch.maximum(lowest, _top_k(tiles, draws, group))
    if draws.has_top_p:
        lowest = torch.maximum(lowest, _top_p(tiles, draws, top, lowest, group))
    return lowest


def _top_k(tiles: _Tempered, draws: Draws, group: TensorGroup) -> torch.Tensor:
    k = torch.where(draws.top_k > 0, draws.top_k, torch.iinfo(torch.int32).max)

    def count(scaled: torch.Tensor, _keys: torch.Tensor) -> torch.Tensor:
        return (scaled > float("-inf")).long()

    return _threshold(tiles, count, lambda total: torch.minimum(k, total), group)


def _top_p(
    tiles: _Tempered, draws: Draws, top: torch.Tensor, lowest: torch.Tensor, group: TensorGroup
) -> torch.Tensor:
    def mass(scaled: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        share = (scaled - top.unsqueeze(1)).exp_().double().mul_(_MASS_ONE).long()
        return share.mul_(keys >= lowest.unsqueeze(1))

    def wanted(total: torch.Tensor) -> torch.Tensor:
        return (total.double() * draws.top_p.double()).ceil().long().clamp(min=1)

    by_mass = _threshold(tiles, mass, wanted, group)
    return by_mass.masked_fill(draws.top_p >= 1, _INT32_MIN)


def _threshold(
    tiles: _Tempered,
    weights_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    target_of: Callable[[torch.Tensor], torch.Tensor],
    group: TensorGroup,
) -> torch.Tensor:
    """int32 [S]: the largest key such that the weights of keys at or above it reach the target.

    `weights_of(scaled, keys)` gives weights of a tile, int64 [S, V]; `target_of(total)` the target
    from the total weight, both int64 [S].
    """
    prefix = target = torch.zeros_like(tiles.temperature, dtype=torch.int64)
    for shift, bits in RADIX:
        histogram = _histogram(tiles, weights_of, prefix, shift, bits)
        group.all_reduce(histogram)
        above = histogram.flip(1).cumsum(1).flip(1)  # weight in this bin and all higher ones
        if shift == RADIX[0][0]:
            target = target_of(above[:, 0])
        chosen = (above >= target.unsqueeze(1)).sum(dim=1, keepdim=True) - 1
        chosen = chosen.clamp(min=0)
        target = target - (above.gather(1, chosen) - histogram.gather(1, chosen)).squeeze(1)
        prefix = prefix | (chosen.squeeze(1) << shift)
    return (prefix + _INT32_MIN).int()


def _histogram(
    tiles: _Tempered,
    weights_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    prefix: torch.Tensor,
    shift: int,
    bits: int,
) -> torch.Tensor:
    """int64 [S, 2^bits]: the weight of the keys that begin with `prefix`, by their next bits.

    `prefix` counts from 0, keys from -2^31: their first bit is the other way round.
    """
    size = 1 << bits
    is_first = shift + bits == 32
    histogram = prefix.new_zeros(len(prefix), size)
    begins = ((prefix + _INT32_MIN) >> (shift + bits)).int().unsqueeze(1)
    for _, scaled in tiles:
        keys = sortable(scaled)
        weights = weights_of(scaled, keys)
        bins = (keys >> shift).bitwise_and_(size - 1)
        if is_first:
            bins ^= size >> 1
        else:
            weights *= (keys >> (shift + bits)) == begins
        histogram.scatter_add_(1, bins.long(), weights)
    return histogram
