"""What a rank computes and moves in a step, from its layout: plain arithmetic, no measurement.

Counted are products of tokens by weights, attention's products with keys and values, weights that are
read, and the cache that is read and written. Norms, activations, rotary and what lies between layers
are not, so that achieved rates are lower bounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bireme.model_config import ModelConfig
from bireme.parallel.cuts import head_edges, vocabulary_width
from bireme.parallel.layout import KVSpec, ModelLayout, ParamLayout, RankLayout
from bireme.request import ScheduledPiece, asked_tokens


@dataclass(frozen=True, kw_only=True)
class RankOperations:
    """One rank's share of every step.

    Elements: of matrices that each token is multiplied by, of the stacked experts, of the head, and of
    a row of the embedding. A token goes through `experts_per_token` of `num_experts` experts. What is `asked` lies
    behind the attention of the last layer of all, where tokens that nobody looks at are left out.
    """

    matrix_elements: int
    expert_elements: int
    num_experts: int
    experts_per_token: int
    head_elements: int
    embedding_row_elements: int
    attention_width: int  # local query heads * head_dim
    kv: tuple[KVSpec, ...]
    item_bytes: int
    asked_matrix_elements: int = 0
    asked_expert_elements: int = 0
    has_last_layer: bool = False

    def flop(self, pieces: Sequence[ScheduledPiece]) -> int:
        """Floating-point operations, two a multiplication with its addition, of steps of which no more is looked at
        than what is sampled: determinism and prompts' log-probabilities take more."""
        num_tokens = sum(piece.num_tokens for piece in pieces)
        num_sampled = sum(piece.samples for piece in pieces)
        whole = self.matrix_elements + self._met(self.expert_elements, 1)
        asked = self.asked_matrix_elements + self._met(self.asked_expert_elements, 1)
        products = (whole - asked) * num_tokens + asked * len(asked_tokens(pieces))
        products += self.head_elements * num_sampled
        pairs = sum(
            _pairs(piece, spec.window)
            for spec, lookers in self._lookers(pieces)
            for piece in lookers
        )
        return 2 * products + 4 * self.attention_width * pairs

    def _met(self, expert_elements: int, num_tokens: int) -> int:
        """Of a layer's experts those that tokens go through, each through others than the rest."""
        used = min(self.num_experts, num_tokens * self.experts_per_token)
        return expert_elements * used // max(1, self.num_experts)

    def _lookers(
        self, pieces: Sequence[ScheduledPiece]
    ) -> Iterator[tuple[KVSpec, Sequence[ScheduledPiece]]]:
        """By layer the tokens whose queries look at its cache."""
        for spec in self.kv[: len(self.kv) - self.has_last_layer]:
            yield spec, pieces
        if self.has_last_layer:
            yield self.kv[-1], asked_tokens(pieces)

    def num_bytes(self, pieces: Sequence[ScheduledPiece]) -> int:
        """Weights once, of experts those of as many tokens as there are, each with others; rows of the
        embedding; the cache of each context once, and that of the new tokens."""
        num_tokens = sum(piece.num_tokens for piece in pieces)
        elements = self.matrix_elements + self.embedding_row_elements * num_tokens
        elements += self._met(self.expert_elements - self.asked_expert_elements, num_tokens)
        elements += self._met(self.asked_expert_elements, len(asked_tokens(pieces)))
        elements += self.head_elements * any(piece.samples for piece in pieces)
        for spec, lookers in self._lookers(pieces):
            read = sum(_num_seen(piece, spec.window) for piece in lookers)
            elements += spec.elements_per_token * (read + num_tokens)
        return elements * self.item_bytes


def context_tokens(pieces: Sequence[ScheduledPiece]) -> int:
    """Places that the tokens look at without a window, each its own among them."""
    return sum(_pairs(piece, None) for piece in pieces)


def rank_operations(
    config: ModelConfig, layout: ModelLayout, rank: RankLayout, item_bytes: int
) -> RankOperations:
    """`item_bytes` is the size of an element of the model's dtype."""
    width, is_last = layout.widths[rank.stage], rank.stage == len(layout.widths) - 1
    edges = head_edges(config.num_heads, config.num_kv_heads, width)
    moe, head = config.moe, vocabulary_width(config.vocab_size, width) * config.embedding_dim
    params = [param for param in rank.params if _is_multiplied(param, config)]
    if config.embedding_dim != config.hidden_size:  # projected before the head
        head += config.embedding_dim * config.hidden_size
        params = [it for it in params if it.shape != (config.embedding_dim, config.hidden_size)]
    asked = _behind_last_attention(params) if is_last else []
    return RankOperations(
        matrix_elements=_num_elements(params, 2),
        expert_elements=_num_elements(params, 3),
        num_experts=moe.num_experts if moe else 0,
        experts_per_token=moe.num_experts_per_tok if moe else 0,
        head_elements=head if is_last else 0,
        embedding_row_elements=config.embedding_dim if rank.stage == 0 else 0,
        attention_width=(edges[rank.tp_rank + 1] - edges[rank.tp_rank]) * config.head_dim,
        kv=rank.kv,
        item_bytes=item_bytes,
        asked_matrix_elements=_num_elements(asked, 2),
        asked_expert_elements=_num_elements(asked, 3),
        has_last_layer=is_last,
    )


def _num_elements(params: Sequence[ParamLayout], num_dims: int) -> int:
    """Of matrices, or of stacked ones."""
    return sum(param.num_elements for param in params if len(param.shape) == num_dims)


def _behind_last_attention(params: Sequence[ParamLayout]) -> Sequence[ParamLayout]:
    """Those that are used after the last queries, keys and values are made."""
    heads = [at for at, it in enumerate(params) if (it.cut, it.unit) == ("column", "query head")]
    return params[heads[-1] + 1 :]


def _is_multiplied(param: ParamLayout, config: ModelConfig) -> bool:
    """By every token: no vocabulary, and no table of positions."""
    positions = config.max_position_embeddings + config.position_offset
    is_table = param.cut == "replicated" and param.shape[0] == positions
    return len(param.shape) > 1 and param.cut != "vocabulary" and not is_table


def _pairs(piece: ScheduledPiece, window: int | None) -> int:
    """Of a token and a place that it looks at: a token at position p looks at p + 1."""
    first, last = piece.start + 1, piece.start + piece.num_tokens
    if window is None or last <= window:
        return _sum(first, last)
    if first >= window:
        return window * piece.num_tokens
    return _sum(first, window) + window * (last - window)


def _sum(first: int, last: int) -> int:
    return (first + last) * (last - first + 1) // 2


def _num_seen(piece: ScheduledPiece, window: int | None) -> int:
    """Places that at least one of the tokens looks at."""
    stop = piece.start + piece.num_tokens
    return stop if window is None else stop - max(0, piece.start - window + 1)
