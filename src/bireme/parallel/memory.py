"""How many bytes a rank needs, from its layout: plain arithmetic, no measurement."""

from __future__ import annotations

from dataclasses import dataclass

from bireme.model_config import ModelConfig
from bireme.parallel.layout import ModelLayout, RankLayout, vocabulary_width


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank: weights, the cache of one token, and the largest step's activations."""

    rank: int
    weight_bytes: int
    cache_bytes_per_token: int
    activation_bytes: int

    def total(self, num_cached_tokens: int) -> int:
        return (
            self.weight_bytes
            + num_cached_tokens * self.cache_bytes_per_token
            + self.activation_bytes
        )


def rank_memory(
    config: ModelConfig,
    rank: RankLayout,
    width: int,
    item_bytes: int,
    num_step_tokens: int,
    num_seqs: int,
) -> RankMemory:
    """`num_step_tokens` bounds a step's tokens, `num_seqs` the rows that are sampled.

    Activations: the residual, its norm, an addend and the local halves of the widest block live at
    once; on the last stage also float32 logits of the sampled rows.
    """
    columns = config.moe.intermediate_size if config.moe else config.intermediate_size
    widest = max(
        2 * -(-columns // width),
        (config.num_heads + 2 * config.num_kv_heads) * config.head_dim // width,
    )
    activations = num_step_tokens * (3 * config.hidden_size + 2 * widest) * item_bytes
    has_head = rank.layers[1] == config.num_layers
    logits = 2 * 4 * num_seqs * vocabulary_width(config.vocab_size, width) if has_head else 0
    return RankMemory(
        rank=rank.rank,
        weight_bytes=rank.num_elements * item_bytes,
        cache_bytes_per_token=sum(share.elements_per_token for share in rank.kv) * item_bytes,
        activation_bytes=activations + logits,
    )


def model_memory(
    config: ModelConfig, layout: ModelLayout, item_bytes: int, num_step_tokens: int, num_seqs: int
) -> list[RankMemory]:
    """One `RankMemory` a rank."""
    return [
        rank_memory(config, rank, layout.widths[rank.stage], item_bytes, num_step_tokens, num_seqs)
        for rank in layout.ranks
    ]
