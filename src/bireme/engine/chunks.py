"""How many tokens of prompts go into one step."""

from __future__ import annotations

import math

MIN_CHUNK_TOKENS = 256


def tokens_at_once(num_given: int, num_stages: int, most: int) -> int:
    """Of prompts with `num_given` tokens in all: with stages, few enough that chunks follow one
    another through them and none works alone."""
    if num_stages == 1:
        return most
    return min(most, max(MIN_CHUNK_TOKENS, -(-num_given // (2 * num_stages))))


def equal_chunk(start: int, budget: int, context_per_token: float, least: int) -> int:
    """Tokens from position `start` on that cost as much as `budget` tokens at a prompt's beginning:
    fewer where there is more to attend to, but at least `least` where the budget allows it.

    n tokens cost n (1 + (start + n / 2) / context_per_token).
    """
    ratio = context_per_token
    if math.isinf(ratio):
        return budget
    cost = budget * (1 + budget / (2 * ratio))
    num_tokens = math.sqrt((ratio + start) ** 2 + 2 * ratio * cost) - ratio - start
    return max(int(num_tokens), min(budget, least))
