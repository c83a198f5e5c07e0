"""Attention on a CPU, by whichever way is fastest for its shape, against the same in float64."""

from __future__ import annotations

import pytest
import torch

from bireme.kernels.attention import COPIED_BYTES, grouped_query_attention

HEAD_DIM, KV_HEADS = 64, 4
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def expected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, cap: float | None
) -> torch.Tensor:
    q, k, v, bias = (x.double() for x in (q, k, v, bias))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * 0.125
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    return torch.softmax(scores + bias, dim=-1) @ v


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("num_sequences", "num_queries", "num_context"),
    [(1, 1, 7), (1, 1, 6000), (1, 33, 600), (5, 1, 40), (12, 1, 1500), (1, 70, 70)],
)
@pytest.mark.parametrize("num_shared", [1, 2])
def test_every_way_equals_float64(
    num_sequences: int,
    num_queries: int,
    num_context: int,
    num_shared: int,
    dtype: torch.dtype,
    cap: float | None,
) -> None:
    """Keys and values as the cache gives them: the heads of a place beside each other, what no query may
    see full of large numbers."""
    rows = torch.randn(2, num_sequences, num_context + 3, KV_HEADS, HEAD_DIM)
    rows[:, :, num_context:] = 1e2
    keys, values = rows.to(dtype).transpose(2, 3)
    heads = KV_HEADS * num_shared
    q = torch.randn(num_sequences, heads, num_queries, HEAD_DIM).mul(5).to(dtype)
    last = torch.arange(num_context - num_queries, num_context).unsqueeze(1)
    is_hidden = torch.arange(num_context + 3) > last
    bias = torch.zeros(is_hidden.shape).masked_fill(is_hidden, float("-inf")).to(dtype)
    bias = bias.expand(num_sequences, 1, -1, -1)
    found = grouped_query_attention(q, keys, values, bias, 0.125, cap)
    assert found.shape == q.shape
    wanted = expected(q, keys, values, bias, cap)
    # a score that is rounded moves its weight by as much as it is large
    assert (found.double() - wanted).abs().max() < TOLERANCE[dtype] * wanted.abs().max()


def test_long_contexts_are_beyond_what_is_copied() -> None:
    """The test above goes both ways."""
    of_place = KV_HEADS * HEAD_DIM * torch.bfloat16.itemsize
    assert 1500 * of_place < COPIED_BYTES < 6000 * of_place
