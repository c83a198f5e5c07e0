"""Sampling without ever seeing the whole vocabulary on one rank."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bireme.engine.sampler import SamplingRows, _lowest_key, _sortable, sample
from bireme.kernels.noise import gumbel_noise
from bireme.parallel.layout import vocabulary_range, vocabulary_width
from bireme.parallel.mesh import Alone
from thread_group import ThreadGroup, run_group

WORKSPACE = 64 * 1000  # a row of 1,000 logits


def rows(
    num: int, temperature: float, top_k: int = 0, top_p: float = 1.0, seed: int = 0
) -> SamplingRows:
    return SamplingRows(
        temperature=torch.full((num,), temperature),
        top_k=torch.full((num,), top_k),
        top_p=torch.full((num,), top_p),
        seeds=torch.arange(num) + seed,
        positions=torch.arange(num) * 3 + 1,
        is_random=temperature > 0,
        is_filtered=bool(temperature > 0 and (top_k or top_p < 1)),
    )


def shard(logits: torch.Tensor, size: int, rank: int) -> torch.Tensor:
    """One rank's padded part, as the head gives it."""
    first, last = vocabulary_range(logits.shape[1], size, rank)
    part = torch.full((logits.shape[0], vocabulary_width(logits.shape[1], size)), -math.inf)
    part[:, : last - first] = logits[:, first:last]
    return part


def test_greedy_is_the_first_best_id() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 3.0, 3.0, 1.0]])
    assert sample(logits, 0, rows(2, 0.0), Alone(), WORKSPACE).tolist() == [1, 0]


@settings(deadline=None, max_examples=30)
@given(
    st.integers(2, 400),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    st.sampled_from([0, 1, 5, 50]),
    st.sampled_from([0.1, 0.7, 0.95, 1.0]),
    st.integers(0, 2**31),
)
def test_the_draw_does_not_depend_on_how_the_vocabulary_is_cut(
    vocab: int, size: int, temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    asked = rows(3, temperature, top_k, top_p, seed)
    whole = sample(shard(logits, 1, 0), 0, asked, Alone(), WORKSPACE)

    def work(rank: int, group: ThreadGroup) -> torch.Tensor:
        first, _ = vocabulary_range(vocab, size, rank)
        return sample(shard(logits, size, rank), first, asked, group, WORKSPACE)

    for part in run_group(size, work):
        assert part.tolist() == whole.tolist()


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.6), (4, 0.8)])
def test_draws_follow_the_filtered_distribution(top_k: int, top_p: float) -> None:
    logits = torch.tensor([1.0, 2.5, 0.3, 2.0, -1.0, 1.5])
    num = 20_000
    drawn = sample(
        logits.expand(num, -1).contiguous(), 0, rows(num, 0.8, top_k, top_p), Alone(), WORKSPACE
    )
    scaled = logits / 0.8
    if top_k:
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[-1], -math.inf)
    order = scaled.softmax(0).sort(descending=True)
    kept = order.values.cumsum(0) - order.values < top_p
    expected = torch.zeros(6).scatter_(0, order.indices, order.values * kept)
    expected /= expected.sum()
    found = drawn.bincount(minlength=6) / num
    assert (found[expected == 0] == 0).all()
    # five standard deviations of a binomial share
    assert (found - expected).abs().max() < 5 * math.sqrt(0.25 / num)


def test_rows_of_one_batch_may_ask_for_different_things() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    mixed = SamplingRows(
        temperature=torch.tensor([0.0, 1.0, 1.0]),
        top_k=torch.tensor([0, 1, 0]),
        top_p=torch.tensor([1.0, 1.0, 1e-6]),
        seeds=torch.tensor([1, 2, 3]),
        positions=torch.tensor([4, 5, 6]),
        is_random=True,
        is_filtered=True,
    )
    assert sample(logits, 0, mixed, Alone(), WORKSPACE).tolist() == logits.argmax(1).tolist()


def test_noise_is_gumbel_and_a_function_of_its_counters() -> None:
    seeds, zeros, positions = (
        torch.tensor([7, 7, 8]),
        torch.zeros(3, dtype=torch.int64),
        torch.tensor([1, 2, 1]),
    )
    ids = torch.arange(100_000)
    noise = gumbel_noise(seeds, zeros, positions, ids)
    assert torch.equal(noise[:, 500:600], gumbel_noise(seeds, zeros, positions, ids[500:600]))
    assert abs(float(noise.mean()) - 0.5772) < 0.01
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.02
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(float(torch.corrcoef(noise[[a, b]])[0, 1])) < 0.02
    # frozen: other devices and languages must draw the same
    assert gumbel_noise(seeds[:1], zeros[:1], positions[:1], torch.tensor([0, 1, 2000])).tolist()[
        0
    ] == pytest.approx(FROZEN, abs=1e-12)


FROZEN = [1.0528287100090419, -0.9353030824892812, -0.550060055338688]


def test_a_row_that_does_not_filter_is_not_filtered_beside_one_that_does() -> None:
    """A token of 2^-40 of the likeliest one's share stays in the draw."""
    logits = torch.tensor([[0.0, -28.0], [0.0, -28.0]])
    both = SamplingRows(
        temperature=torch.ones(2),
        top_k=torch.zeros(2, dtype=torch.int64),
        top_p=torch.tensor([1.0, 0.5]),
        seeds=torch.zeros(2, dtype=torch.int64),
        positions=torch.zeros(2, dtype=torch.int64),
        is_random=True,
        is_filtered=True,
    )
    lowest = _lowest_key([logits], both, Alone())
    kept = _sortable(logits) >= lowest.unsqueeze(1)
    assert kept.tolist() == [[True, True], [True, False]]
