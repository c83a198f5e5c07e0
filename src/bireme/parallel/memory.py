"""How many bytes a rank needs, from its layout: plain arithmetic, no measurement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from bireme.model_config import ModelConfig
from bireme.parallel.cuts import vocabulary_width
from bireme.parallel.layout import RankLayout

# of a sampled row, its sums and their copies (`engine/sampling/choosing.py`; on GPUs one of four)
_HISTOGRAM_BYTES = 4 * 8 * 2048
_SAID_BYTES = 4  # of a token that penalties must know (`engine/sampling/penalties.py`)


@dataclass(frozen=True, kw_only=True)
class StepLimits:
    """The largest step: its tokens, the rows that are sampled, the longest context (tokens), and
    the bytes that attention and sampling may hold for a moment."""

    num_tokens: int
    num_seqs: int
    max_model_len: int
    workspace_bytes: int


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank: weights, the cache of one token (in all layers, and in those of each
    window), and what the largest step holds."""

    rank: int
    weight_bytes: int
    cache_bytes_per_token: int
    activation_bytes: int
    cache_bytes_by_window: Mapping[int | None, int]

    def total(self, num_cached_tokens: int) -> int:
        return (
            self.weight_bytes
            + num_cached_tokens * self.cache_bytes_per_token
            + self.activation_bytes
        )

    def cache_bytes(self, num_tokens: Mapping[int | None, int]) -> int:
        """Of so many cached tokens in the layers of each window."""
        return sum(size * num_tokens[window] for window, size in self.cache_bytes_by_window.items())


def rank_memory(
    config: ModelConfig,
    widths: tuple[int, ...],
    rank: RankLayout,
    item_bytes: int,
    limits: StepLimits,
) -> RankMemory:
    """What one rank needs at most; `item_bytes` is the size of an element of its dtype."""
    step = _token_bytes(config, widths, rank, item_bytes) * limits.num_tokens
    logits = 0
    if rank.stage == len(widths) - 1:
        width = vocabulary_width(config.vocab_size, widths[-1])
        # what was said stays, but attention has no logits beside it, and sampling no places
        row = max(
            width * (4 + 2 * item_bytes) + _HISTOGRAM_BYTES, _SAID_BYTES * limits.max_model_len
        )
        logits = limits.num_seqs * row
    cached: Counter[int | None] = Counter()
    for spec in rank.kv:
        cached[spec.window] += spec.elements_per_token * item_bytes
    return RankMemory(
        rank=rank.rank,
        weight_bytes=rank.num_elements * item_bytes,
        cache_bytes_per_token=cached.total(),
        activation_bytes=step + logits + _workspace(config, rank, item_bytes, limits),
        cache_bytes_by_window=dict(cached),
    )


def _token_bytes(
    config: ModelConfig, widths: tuple[int, ...], rank: RankLayout, item_bytes: int
) -> int:
    """Of each token: the residual, a block's input and output, what the widest block or a norm in
    float32 holds, and messages to the next stage that were not taken yet."""
    hidden = config.hidden_size * item_bytes
    block = max(rank.work.token_elements * item_bytes, 2 * 4 * config.hidden_size)
    has_next = rank.stage < len(widths) - 1
    return 3 * hidden + block + ((len(widths) + 2) * hidden if has_next else 0)


def _workspace(config: ModelConfig, rank: RankLayout, item_bytes: int, limits: StepLimits) -> int:
    """What attention gathers and scores (`engine/slots.py`), as far as contexts can be that long,
    and where the places of every context are."""
    place_bytes = rank.work.place_elements * item_bytes
    score_bytes = rank.work.score_elements * 4
    longest, budget = limits.max_model_len, limits.workspace_bytes
    gathered = max(min(budget // 2, limits.num_seqs * longest * place_bytes), longest * place_bytes)
    if (
        item_bytes < 4 or config.attention_softcap is not None
    ):  # `kernels/attention.py` copies it as well
        gathered = max(gathered, min(2 * gathered, 2 * rank.work.copied_bytes))
    pairs = max(limits.num_tokens, limits.num_seqs) * longest
    scores = max(min(budget // 4, pairs * score_bytes), longest * score_bytes)
    places = 8 * limits.num_seqs * longest * len({spec.window for spec in rank.kv})
    return gathered + scores + min(budget // 4, pairs * score_bytes) + places
