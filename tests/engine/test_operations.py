"""What ranks compute and move, counted from layouts: by hand for one shape, and the same at every width."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bireme.config import ParallelConfig
from bireme.hf_config import from_hf
from bireme.model_config import ModelConfig
from bireme.models.registry import model_layout
from bireme.parallel.operations import RankOperations, context_tokens, rank_operations
from bireme.request import ScheduledPiece

SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
ATTENTION = 64 * 64 + 2 * (32 * 64) + 64 * 64  # q, k and v, out
LAYER = ATTENTION + 3 * 64 * 128
BEHIND = 64 * 64 + 3 * 64 * 128  # attention
HEAD = 256 * 64


def config(**more: object) -> ModelConfig:
    return from_hf({**SHAPE, **more})


def operations(model: ModelConfig, widths: tuple[int, ...]) -> list[RankOperations]:
    layout = model_layout(model, ParallelConfig(widths=widths))
    return [rank_operations(model, layout, rank, 4) for rank in layout.ranks]


def piece(start: int, num_tokens: int, *, samples: bool = True) -> ScheduledPiece:
    return ScheduledPiece(0, start, num_tokens, None, [], samples=samples)


def test_a_decode_of_one_request_is_counted_by_hand() -> None:
    """Its token, at position 9, looks at 10 places in each of 4 layers of 8 heads."""
    (whole,) = operations(config(), (1,))
    products, pairs = 4 * LAYER + HEAD, 4 * 10
    assert whole.flop([piece(9, 1)]) == 2 * products + 4 * 64 * pairs
    cached = 4 * (2 * 32) * (10 + 1)  # keys and values of 4 KV heads: read, and the token's written
    assert whole.num_bytes([piece(9, 1)]) == 4 * (products + 64 + cached)


def test_a_prompt_reads_weights_once_and_goes_through_the_last_layer_with_one_token() -> None:
    (whole,) = operations(config(), (1,))
    chunk = [piece(0, 6, samples=False)]
    products = 3 * LAYER * 6 + (LAYER - BEHIND) * 6 + BEHIND
    pairs = 3 * (1 + 2 + 3 + 4 + 5 + 6) + 6
    assert whole.flop(chunk) == 2 * products + 4 * 64 * pairs
    assert whole.flop([piece(0, 6)]) == whole.flop(chunk) + 2 * HEAD
    assert whole.num_bytes(chunk) == 4 * (4 * LAYER + 6 * 64 + 4 * 64 * (6 + 6))
    assert context_tokens(chunk) == 21


def test_a_window_bounds_what_is_looked_at() -> None:
    model = config()
    windowed = dataclasses.replace(model, windows=(3,) * 4)
    (whole,), (narrow,) = operations(model, (1,)), operations(windowed, (1,))
    for one in (piece(0, 6), piece(2, 2), piece(9, 1), piece(1, 1)):
        positions = range(one.start, one.start + one.num_tokens)
        seen = sum(min(3, position + 1) for position in positions)
        less = 3 * (sum(position + 1 for position in positions) - seen)
        less += max(0, positions[-1] + 1 - 3)  # in the last layer the last token alone looks back
        assert whole.flop([one]) - narrow.flop([one]) == 4 * 64 * less
        places = {place for p in positions for place in range(max(0, p - 2), p + 1)}
        wide_places = positions[-1] + 1
        saved = whole.num_bytes([one]) - narrow.num_bytes([one])
        of_last = max(0, wide_places - 3)
        assert saved == 4 * 64 * (3 * (wide_places - len(places)) + of_last)


def test_of_experts_a_token_goes_through_some() -> None:
    moe = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    (whole,) = operations(config(**moe), (1,))
    expert, router = 3 * 64 * 128, 4 * 64
    token = 4 * (ATTENTION + router + 2 * expert) + HEAD
    assert whole.flop([piece(0, 1)]) == 2 * token + 4 * 64 * 4
    one, many = whole.num_bytes([piece(0, 1)]), whole.num_bytes([piece(0, 1)] * 8)
    of_tokens = 4 * (64 + 4 * 64 * 2)  # the embedding's row; the cache read and written
    assert many - 8 * of_tokens - (one - of_tokens) == 4 * 4 * 2 * expert  # the other two as well


def test_a_table_of_positions_is_looked_up() -> None:
    gpt2 = from_hf({
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 256, "n_embd": 64,
        "n_layer": 2, "n_head": 4, "n_positions": 100, "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
    })  # fmt: skip
    (whole,) = operations(gpt2, (1,))
    assert whole.matrix_elements == 2 * (4 * 64 * 64 + 2 * 64 * 256)


PIECES = st.lists(
    st.builds(piece, st.integers(0, 300), st.integers(1, 40), samples=st.booleans()), min_size=1
)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([(2,), (1, 1), (2, 2), (4, 1), (2, 1, 4)]), PIECES)
def test_ranks_together_compute_what_one_would(
    widths: tuple[int, ...], pieces: list[ScheduledPiece]
) -> None:
    """Where nothing is held twice: heads and columns divide. Of bytes that is true too, but for the
    embedding's rows, which each rank of a group may have to read."""
    (whole,) = operations(config(), (1,))
    parts = operations(config(), widths)
    assert sum(rank.flop(pieces) for rank in parts) == whole.flop(pieces)
    rows = 4 * 64 * sum(one.num_tokens for one in pieces) * (widths[0] - 1)
    assert sum(rank.num_bytes(pieces) for rank in parts) - rows == whole.num_bytes(pieces)


def test_the_weights_of_a_decode_are_those_that_are_held() -> None:
    """But for norms and the embedding's other rows."""
    for rank in operations(config(), (2, 2)):
        read = rank.matrix_elements + rank.expert_elements + rank.head_elements
        assert read == pytest.approx(2 * LAYER / 2 + (HEAD / 2 if rank.head_elements else 0))
