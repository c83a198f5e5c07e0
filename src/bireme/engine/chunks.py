"""How many tokens of prompts go into one step.

A token's own work is 1, and what it attends to is 1 / context_per_token a place: the first n tokens of a prompt cost
n (1 + n / 2 / context_per_token).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ChunkSizes:
    """What suits a device. `least`: tokens about as quick, each, as those of a longer chunk. `multiple`: sizes that its
    tiles are made for. `whole`: the same of chunks that have nearly so many, since its graphs have no rows behind them
    then, and attention leaves no multiprocessor idle at its end. `per_stage`: chunks of a long prompt; more, and what
    each costs beside its tokens tells. `context_cost`: how much longer a multiplication of attention takes than one by
    a token's matrices."""

    least: int
    multiple: int
    whole: int
    per_stage: int
    context_cost: float

    def fitting(self, num_tokens: float) -> int:
        if num_tokens >= _NEARLY * self.whole:
            return max(1, round(num_tokens / self.whole)) * self.whole
        return math.ceil(num_tokens / self.multiple - 1e-9) * self.multiple


_NEARLY = 0.75
CPU_CHUNKS = ChunkSizes(least=256, multiple=1, whole=1, per_stage=8, context_cost=1.0)
# measured on H200s, with heads of 128
GPU_CHUNKS = ChunkSizes(least=512, multiple=64, whole=512, per_stage=12, context_cost=1.6)


def chunk_cost(
    num_given: int, num_stages: int, most: int, sizes: ChunkSizes, context_per_token: float
) -> float:
    """Of each chunk of prompts with `num_given` tokens in all. With one stage that of the largest step at a prompt's
    beginning; with more, so little that chunks follow one another through them and none works alone for long."""
    if num_stages == 1:
        return _cost(most, context_per_token)
    count = max(1, min(round(num_given / sizes.least), sizes.per_stage * num_stages))
    return _cost(num_given, context_per_token) / count


def chunk_tokens(
    start: int, stop: int, most: int, cost: float, sizes: ChunkSizes, context_per_token: float
) -> int:
    """Of a prompt's tokens [start, stop) those that cost about `cost`, at most `most`: as much as each chunk after
    them, so that no small one is left over."""
    left = _cost(stop, context_per_token) - _cost(start, context_per_token)
    count = round(left / cost)
    if count <= 1:
        return min(most, stop - start)
    num_tokens = _num_tokens(start, left / count, context_per_token)
    return min(most, stop - start, sizes.fitting(num_tokens))


def _cost(num_tokens: float, context_per_token: float) -> float:
    return num_tokens * (1 + num_tokens / 2 / context_per_token)


def _num_tokens(start: int, cost: float, context_per_token: float) -> float:
    """How many from `start` on cost so much."""
    ratio = context_per_token
    if math.isinf(ratio):
        return cost
    return math.sqrt((ratio + start) ** 2 + 2 * ratio * cost) - ratio - start
