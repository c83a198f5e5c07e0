"""Achieved rates: what was counted of each step, by the time in which it was computed."""

from __future__ import annotations

import pytest
from piped import US, Piped

from bireme.observe.rates import rank_rates
from bireme.parallel.layout import KVSpec
from bireme.parallel.operations import RankOperations
from bireme.request import ScheduledBatch, ScheduledPiece

ONE = RankOperations(
    matrix_elements=1000, expert_elements=0, num_experts=0, experts_per_token=0, head_elements=0,
    embedding_row_elements=0, attention_width=0, kv=(KVSpec(1, None),), item_bytes=2,
)  # fmt: skip


def batch(step_id: int, num_tokens: int, *, is_decode: bool) -> ScheduledBatch:
    ids = None if is_decode else [7] * num_tokens
    piece = ScheduledPiece(0, 0, num_tokens, ids, [], samples=True)
    return ScheduledBatch(0, step_id, [], [piece])


def test_prompts_and_decodes_are_told_apart() -> None:
    """The first of five steps is a prompt of 50 tokens, ten times as slow as the others."""
    piped = Piped(2, 5, 2, lambda _stage, step: (100 if step else 1000) * US).run()
    steps = [
        batch(0, 50, is_decode=False),
        *(batch(step, 1, is_decode=True) for step in range(1, 5)),
    ]
    rates = rank_rates(
        piped.ledger(), {one.header: one for one in steps}, [ONE, ONE], "float32", None
    )
    assert [(rate.rank, rate.phase, rate.num_steps, rate.num_tokens) for rate in rates] == [
        (0, "prefill", 1, 50), (0, "decode", 4, 4), (1, "prefill", 1, 50), (1, "decode", 4, 4),
    ]  # fmt: skip
    for rate in rates:
        is_prefill = rate.phase == "prefill"
        flop = 2 * 1000 * (50 if is_prefill else 4)
        seconds = 1000e-6 if is_prefill else 400e-6
        assert rate.flop == flop
        assert rate.compute_s == pytest.approx(seconds)
        assert rate.flop_per_s == pytest.approx(flop / seconds)
        assert rate.num_bytes == 2 * (1000 + 100 if is_prefill else 4 * (1000 + 2))
        assert (rate.ceiling_flop_per_s, rate.ceiling_bytes_per_s) == (None, None)


def test_a_step_of_which_nothing_is_known_is_in_no_rate() -> None:
    piped = Piped(1, 3, 1).run()
    one = batch(1, 1, is_decode=True)
    (rate,) = rank_rates(piped.ledger(), {one.header: one}, [ONE], "float32", None)
    assert (rate.num_steps, rate.compute_s) == (1, pytest.approx(100e-6))
