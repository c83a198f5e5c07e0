"""How prompts are cut into the chunks that follow one another through the stages."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bireme.engine.chunks import CPU_CHUNKS, GPU_CHUNKS, ChunkSizes, equal_chunk, tokens_at_once

RATIO = 10_000.0


def chunks(
    num_tokens: int, num_stages: int, most: int, sizes: ChunkSizes, ratio: float = RATIO
) -> list[int]:
    budget = tokens_at_once(num_tokens, num_stages, most, sizes, ratio)
    found: list[int] = []
    while (start := sum(found)) < num_tokens:
        found.append(min(equal_chunk(start, budget, ratio, 16, sizes), num_tokens - start))
    return found


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(100, [100]), (600, [320, 280]), (1024, [384, 384, 256])]
)
def test_short_prompts_on_a_gpu(num_tokens: int, expected: list[int]) -> None:
    assert chunks(num_tokens, 2, 8192, GPU_CHUNKS) == expected


def test_a_long_prompt_is_cut_so_that_no_stage_works_alone_for_long() -> None:
    """m chunks of the same cost over p stages are p m / (m + p - 1) times as fast as one."""
    found = chunks(32768, 2, 8192, GPU_CHUNKS)
    assert 15 <= len(found) <= 17
    assert 2 * len(found) / (len(found) + 1) > 1.85


def test_one_stage_takes_as_many_as_it_may() -> None:
    assert chunks(10_000, 1, 4096, CPU_CHUNKS, math.inf) == [4096, 4096, 1808]


@given(
    num_tokens=st.integers(1, 50_000),
    num_stages=st.integers(2, 8),
    most=st.integers(64, 8192),
    ratio=st.sampled_from([200.0, RATIO, math.inf]),
    sizes=st.sampled_from([CPU_CHUNKS, GPU_CHUNKS]),
)
def test_chunks_shrink_as_contexts_grow(
    num_tokens: int, num_stages: int, most: int, ratio: float, sizes: ChunkSizes
) -> None:
    found = chunks(num_tokens, num_stages, most, sizes, ratio)
    assert found == sorted(found, reverse=True)
    assert max(found) <= most
    if most >= num_tokens:  # nothing is left over
        assert len(found) <= max(1, round(num_tokens / sizes.least))
    if max(found) < most:
        assert len(found) <= max(1, min(round(num_tokens / sizes.least), 8 * num_stages))
    whole = found[:-1]
    assert all(size % sizes.multiple == 0 for size in whole if 16 < size < most)
