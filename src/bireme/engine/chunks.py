"""How many tokens of prompts go into one step.

A token's own work is 1, and what it attends to is 1 / context_per_token a place: the first n tokens of a prompt cost
n (1 + n / 2 / context_per_token).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# of steps with prompts, that a GPU has graphs of: others have rows of no request behind them
GRAPH_ROWS = (
    64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048,
    2560, 3072, 3584, 4096,
)  # fmt: skip
_NEAR = 0.35  # of a chunk: so much more or less is as well
_WORTH = 0.85  # of what a GPU has at once, on average


@dataclass(frozen=True)
class ChunkSizes:
    """What suits a device. `least`: tokens about as quick, each, as those of a longer chunk. `per_stage`: chunks of a
    long prompt; more, and what each costs beside its tokens tells. `context_cost`: how much longer a multiplication of
    attention takes than one by a token's matrices. `rows`: of a step, that leave none unused, if not all do, and those
    of them that leave no multiprocessor unused either."""

    least: int
    per_stage: int
    context_cost: float = 1.0
    rows: tuple[int, ...] = ()
    best_rows: frozenset[int] = frozenset()

    def fitting(self, num_tokens: float, beside: int) -> int:
        """Tokens, about so many, that are such rows with `beside` others."""

        def apart(rows: int) -> float:
            return abs(rows - beside - num_tokens)

        near = [rows for rows in self.rows if apart(rows) <= _NEAR * num_tokens]
        if not near:
            return math.ceil(num_tokens - 1e-9)
        best = [rows for rows in near if rows in self.best_rows]
        return min(best or near, key=apart) - beside


CPU_CHUNKS = ChunkSizes(least=256, per_stage=8)


def gpu_chunks(num_heads: int, tile: int, tiles_at_once: int) -> ChunkSizes:
    """As measured on H200s: of ranks that attend to `tile` queries at a time, and of so many query heads to
    `tiles_at_once`."""

    def is_filled_by(rows: int) -> bool:
        num_tiles = -(-rows // tile) * num_heads
        turns = -(-num_tiles // tiles_at_once)
        return turns == 1 or num_tiles >= _WORTH * turns * tiles_at_once

    best = frozenset(filter(is_filled_by, GRAPH_ROWS))
    return ChunkSizes(least=512, per_stage=12, context_cost=1.6, rows=GRAPH_ROWS, best_rows=best)


def chunk_cost(
    num_given: int, num_stages: int, most: int, sizes: ChunkSizes, context_per_token: float
) -> float:
    """Of each chunk of prompts with `num_given` tokens in all. With one stage that of the largest step at a prompt's
    beginning; with more, so little that chunks follow one another through them and none works alone for long."""
    ratio = context_per_token / sizes.context_cost
    if num_stages == 1:
        return _cost(most, ratio)
    count = max(1, min(round(num_given / sizes.least), sizes.per_stage * num_stages))
    return _cost(num_given, ratio) / count


def chunk_tokens(
    start: int,
    stop: int,
    most: int,
    cost: float,
    sizes: ChunkSizes,
    context_per_token: float,
    beside: int = 0,
) -> int:
    """Of a prompt's tokens [start, stop) those that cost about `cost`, at most `most`, in a step with `beside` other
    rows: as much as each chunk after them, so that no small one is left over."""
    ratio = context_per_token / sizes.context_cost
    left = _cost(stop, ratio) - _cost(start, ratio)
    count = round(left / cost)
    if count <= 1:
        return min(most, stop - start)
    num_tokens = _num_tokens(start, left / count, ratio)
    return min(most, stop - start, sizes.fitting(num_tokens, beside))


def _cost(num_tokens: float, context_per_token: float) -> float:
    return num_tokens * (1 + num_tokens / 2 / context_per_token)


def _num_tokens(start: int, cost: float, context_per_token: float) -> float:
    """How many from `start` on cost so much."""
    ratio = context_per_token
    if math.isinf(ratio):
        return cost
    return math.sqrt((ratio + start) ** 2 + 2 * ratio * cost) - ratio - start
