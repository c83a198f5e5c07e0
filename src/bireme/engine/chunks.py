"""How many tokens of prompts go into one step."""

from __future__ import annotations

import math
from dataclasses import dataclass

CHUNKS_PER_STAGE = 8  # of a long prompt: more, and what each costs beside its tokens tells


@dataclass(frozen=True)
class ChunkSizes:
    """What suits a device. `least`: tokens about as quick, each, as those of a longer chunk. `multiple`: to which
    steps are filled up anyway."""

    least: int = 256
    multiple: int = 1


CPU_CHUNKS = ChunkSizes()
GPU_CHUNKS = ChunkSizes(least=384, multiple=64)


def tokens_at_once(
    num_given: int, num_stages: int, most: int, sizes: ChunkSizes, context_per_token: float
) -> int:
    """At the beginning of prompts with `num_given` tokens in all: with stages, few enough that chunks of equal cost
    follow one another through them and none works alone."""
    if num_stages == 1:
        return most
    count = max(1, min(round(num_given / sizes.least), CHUNKS_PER_STAGE * num_stages))
    cost = _cost(num_given, context_per_token) / count
    return min(most, _aligned(_num_tokens(0, cost, context_per_token), sizes))


def equal_chunk(
    start: int, budget: int, context_per_token: float, least: int, sizes: ChunkSizes
) -> int:
    """Tokens from position `start` on that cost about as much as `budget` tokens at a prompt's beginning:
    fewer where there is more to attend to, but at least `least` where the budget allows it."""
    cost = _cost(budget, context_per_token)
    num_tokens = _num_tokens(start, cost, context_per_token)
    return min(budget, max(_aligned(num_tokens, sizes), least))


def _cost(num_tokens: float, context_per_token: float) -> float:
    """n tokens at a prompt's beginning cost n (1 + n / 2 / context_per_token)."""
    return num_tokens * (1 + num_tokens / 2 / context_per_token)


def _num_tokens(start: int, cost: float, context_per_token: float) -> float:
    """How many from `start` on cost so much."""
    ratio = context_per_token
    if math.isinf(ratio):
        return cost
    return math.sqrt((ratio + start) ** 2 + 2 * ratio * cost) - ratio - start


def _aligned(num_tokens: float, sizes: ChunkSizes) -> int:
    """Rounded up: what a long prompt's chunks left over would be a chunk of its own."""
    return math.ceil(num_tokens / sizes.multiple - 1e-9) * sizes.multiple
