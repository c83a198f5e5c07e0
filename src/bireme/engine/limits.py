"""What a scheduler keeps to."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bireme.engine.chunks import CPU_CHUNKS, ChunkSizes


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits:
    """`context_per_token`: the context length (tokens) at which attending to it costs a token as
    much as the rest of its work. `depends_on_length`: keys and values are those of requests with
    the same longest length only."""

    pp_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    max_num_waiting: int | None = None
    has_prefix_caching: bool = True
    context_per_token: float = math.inf
    depends_on_length: bool = False
    chunks: ChunkSizes = CPU_CHUNKS
