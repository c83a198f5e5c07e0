"""How many tokens of prompts go into one step.

A token's own work is 1, and what it attends to is 1 / context_per_token a place: the first n tokens of a prompt cost
n (1 + n / 2 / context_per_token).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

CHUNKS_PER_STAGE = 8  # of a long prompt: more, and what each costs beside its tokens tells


@dataclass(frozen=True)
class ChunkSizes:
    """What suits a device. `least`: tokens about as quick, each, as those of a longer chunk. `multiple`: sizes that
    its graphs and tiles are made for."""

    least: int = 256
    multiple: int = 1


CPU_CHUNKS = ChunkSizes()
GPU_CHUNKS = ChunkSizes(least=384, multiple=64)


def chunk_cost(
    num_given: int, num_stages: int, most: int, sizes: ChunkSizes, context_per_token: float
) -> float:
    """Of each chunk of prompts with `num_given` tokens in all. With one stage that of the largest step at a prompt's
    beginning; with more, so little that chunks follow one another through them and none works alone for long."""
    if num_stages == 1:
        return _cost(most, context_per_token)
    count = max(1, min(round(num_given / sizes.least), CHUNKS_PER_STAGE * num_stages))
    return _cost(num_given, context_per_token) / count


def chunk_tokens(
    start: int, stop: int, most: int, cost: float, sizes: ChunkSizes, context_per_token: float
) -> int:
    """Of a prompt's tokens [start, stop) those that cost about `cost`, at most `most`: as much as each chunk after
    them, so that no small one is left over."""
    left = _cost(stop, context_per_token) - _cost(start, context_per_token)
    each = left / max(1, round(left / cost))
    num_tokens = _num_tokens(start, each, context_per_token)
    aligned = math.ceil(num_tokens / sizes.multiple - 1e-9) * sizes.multiple
    return min(most, stop - start, aligned)


def _cost(num_tokens: float, context_per_token: float) -> float:
    return num_tokens * (1 + num_tokens / 2 / context_per_token)


def _num_tokens(start: int, cost: float, context_per_token: float) -> float:
    """How many from `start` on cost so much."""
    ratio = context_per_token
    if math.isinf(ratio):
        return cost
    return math.sqrt((ratio + start) ** 2 + 2 * ratio * cost) - ratio - start
