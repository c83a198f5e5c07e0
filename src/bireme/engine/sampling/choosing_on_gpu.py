"""`choosing` in few launches, which a graph can hold: all rows at once, whatever each of them asks for.

Shapes: S rows, V local vocabulary.
"""

from __future__ import annotations

import torch

from bireme.engine.sampling.shard import Shard
from bireme.kernels.draws import RADIX, Draws
from bireme.parallel.mesh import TensorGroup


def choose_on_gpu(logits: torch.Tensor, shard: Shard, draws: Draws | None) -> torch.Tensor:
    """int64 [S], the same on every rank; None draws, and a temperature of 0, take the likeliest id.

    Logits [S, V] of any dtype, -inf where an id may not be chosen; the lowest of equals is.
    """
    from bireme.kernels.gpu.sampling import best_of_parts, first_of_best

    lowest = None
    if draws is not None and draws.is_filtered:
        lowest = _lowest_keys(logits, draws, shard.group)
    best = best_of_parts(logits, shard.first_id, draws, lowest)
    return first_of_best(shard.group.all_gather(best).flatten(0, 1))


def _lowest_keys(logits: torch.Tensor, draws: Draws, group: TensorGroup) -> torch.Tensor:
    """int64 [S], from 0: the least key that stays: min-p and top-k, then top-p of what they leave."""
    from bireme.kernels.gpu.sampling import Thresholds

    found = Thresholds(logits, draws, group.all_gather(logits.amax(dim=1)))
    for has_limit, by_mass in ((draws.has_top_k, False), (draws.has_top_p, True)):
        for shift, bits in RADIX if has_limit else ():
            found.weigh(shift, bits, by_mass=by_mass)
            group.all_reduce(found.histogram)
            found.descend(shift, bits, by_mass=by_mass)
    return found.lowest
