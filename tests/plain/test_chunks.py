"""How prompts are cut into the chunks that follow one another through the stages."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bireme.engine.chunks import (
    CPU_CHUNKS,
    GRAPH_ROWS,
    ChunkSizes,
    chunk_cost,
    chunk_tokens,
    gpu_chunks,
)

RATIO = 10_000.0
NEAR = 0.35  # of a chunk
TILE, TILES_AT_ONCE = 64, 264  # of a Hopper GPU


def of_heads(num_heads: int) -> ChunkSizes:
    return gpu_chunks(num_heads, TILE, TILES_AT_ONCE)


GPU_CHUNKS = of_heads(32)


def chunks(
    num_tokens: int, num_stages: int, most: int, sizes: ChunkSizes, ratio: float = RATIO
) -> list[int]:
    cost = chunk_cost(num_tokens, num_stages, most, sizes, ratio)
    found: list[int] = []
    while (start := sum(found)) < num_tokens:
        found.append(chunk_tokens(start, num_tokens, most, cost, sizes, ratio))
    return found


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(100, [100]), (700, [700]), (800, [384, 416]), (1024, [512, 512]), (3584, 7 * [512])],
)
def test_short_prompts_on_a_gpu(num_tokens: int, expected: list[int]) -> None:
    assert chunks(num_tokens, 2, 8192, GPU_CHUNKS) == expected


@pytest.mark.parametrize("beside", [1, 33, 64, 100, 200])
@pytest.mark.parametrize("num_heads", [8, 28, 32, 40, 56, 64])
def test_chunks_beside_other_rows_leave_no_row_of_a_graph(beside: int, num_heads: int) -> None:
    sizes = of_heads(num_heads)
    cost = chunk_cost(8192, 2, 4096, sizes, RATIO)
    first = chunk_tokens(0, 8192, 4096, cost, sizes, RATIO, beside=beside)
    assert first + beside in GRAPH_ROWS
    alone = chunk_tokens(0, 8192, 4096, cost, sizes, RATIO)
    assert 0.6 * alone <= first <= 1.6 * alone


@pytest.mark.parametrize("num_heads", [16, 32, 64])
def test_chunks_of_a_long_prompt_leave_few_multiprocessors_unused(num_heads: int) -> None:
    """Of 512 queries of 32 heads there are 256 tiles of the 264 that there are at once, of 640 there are 320."""
    for size in chunks(32768, 2, 4096, of_heads(num_heads))[:-1]:
        num_tiles = size / TILE * num_heads
        assert num_tiles >= 0.8 * TILES_AT_ONCE * math.ceil(num_tiles / TILES_AT_ONCE), size


def test_chunks_of_a_long_prompt_of_32_heads() -> None:
    assert {size % 512 for size in chunks(32768, 2, 4096, GPU_CHUNKS)} == {0}


def test_a_long_prompt_is_cut_so_that_no_stage_works_alone_for_long() -> None:
    """m chunks of the same cost over p stages are p m / (m + p - 1) times as fast as one."""
    found = chunks(32768, 2, 8192, GPU_CHUNKS)
    assert 22 <= len(found) <= 26
    assert 2 * len(found) / (len(found) + 1) > 1.9


def test_what_a_step_may_have_at_most_is_no_reason_for_smaller_chunks_later() -> None:
    found = chunks(100_000, 2, 8192, GPU_CHUNKS)
    assert found[0] == 8192
    assert len(found) <= 26


def test_one_stage_takes_as_many_as_it_may() -> None:
    assert chunks(10_000, 1, 4096, CPU_CHUNKS, math.inf) == [4096, 4096, 1808]


@given(
    num_tokens=st.integers(1, 50_000),
    num_stages=st.integers(2, 8),
    most=st.integers(64, 8192),
    ratio=st.sampled_from([200.0, RATIO, math.inf]),
    sizes=st.sampled_from([CPU_CHUNKS, *map(of_heads, (5, 28, 32, 56))]),
)
def test_chunks_of_a_prompt(
    num_tokens: int, num_stages: int, most: int, ratio: float, sizes: ChunkSizes
) -> None:
    found = chunks(num_tokens, num_stages, most, sizes, ratio)
    assert sum(found) == num_tokens
    assert max(found) <= most
    count = max(1, min(round(num_tokens / sizes.least), sizes.per_stage * num_stages))
    if max(found) < most:  # few more than are wanted: rows that suit a GPU may be that much fewer
        assert len(found) <= (count / (1 - NEAR) + 1 if sizes.rows else count)


@given(
    num_tokens=st.integers(1000, 50_000),
    num_stages=st.integers(2, 8),
    ratio=st.sampled_from([2000.0, RATIO, math.inf]),
)
def test_chunks_cost_the_same(num_tokens: int, num_stages: int, ratio: float) -> None:
    found = chunks(num_tokens, num_stages, num_tokens, CPU_CHUNKS, ratio)
    starts = [sum(found[:index]) for index in range(len(found))]
    costs = [n * (1 + (start + n / 2) / ratio) for n, start in zip(found, starts, strict=True)]
    assert max(costs) < 1.1 * min(costs)


@given(
    num_tokens=st.integers(1000, 50_000),
    num_stages=st.integers(2, 8),
    num_heads=st.sampled_from([8, 32, 56]),
)
def test_chunks_on_a_gpu_cost_nearly_the_same(
    num_tokens: int, num_stages: int, num_heads: int
) -> None:
    sizes = of_heads(num_heads)
    found, ratio = chunks(num_tokens, num_stages, 4096, sizes), RATIO / sizes.context_cost
    starts = [sum(found[:index]) for index in range(len(found))]
    costs = [n * (1 + (start + n / 2) / ratio) for n, start in zip(found, starts, strict=True)]
    if max(found) < 4096:
        assert max(costs) < 1.8 * sum(costs) / len(costs)
