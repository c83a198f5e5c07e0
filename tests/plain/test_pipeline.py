"""Stages, edges and partitions as data."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bireme.errors import ConfigError
from bireme.parallel.pipeline import (
    Edge,
    edges_between,
    forward_edges,
    partition,
    sampled_edges,
    stage_ranks,
    stage_specs,
)

WIDTHS = st.lists(st.integers(1, 8), min_size=1, max_size=5)


@given(WIDTHS)
def test_every_rank_belongs_to_one_stage(widths: list[int]) -> None:
    assert [rank for ranks in stage_ranks(widths) for rank in ranks] == list(range(sum(widths)))


@given(WIDTHS)
def test_every_receiver_has_one_sender_of_the_stage_before(widths: list[int]) -> None:
    ranks = stage_ranks(widths)
    edges = forward_edges(widths)
    assert sorted(edge.dst for edge in edges) == [rank for stage in ranks[1:] for rank in stage]
    for edge in edges:
        stage = next(stage for stage, members in enumerate(ranks) if edge.dst in members)
        assert edge.src in ranks[stage - 1]


def test_equal_widths_pair_rank_by_rank_and_unequal_ones_by_the_rule() -> None:
    assert edges_between((2, 2), 0, 1) == (Edge(0, 2), Edge(1, 3))
    assert edges_between((3, 2), 0, 1) == (Edge(0, 3), Edge(1, 4))
    assert sampled_edges((1, 4)) == (Edge(1, 0),)
    assert sampled_edges((4,)) == ()


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=7),
    st.data(),
    st.integers(0, 30),
    st.integers(0, 30),
)
def test_no_other_partition_has_a_faster_slowest_stage(
    costs: list[int], data: st.DataObject, first: int, last: int
) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    widths = data.draw(st.lists(st.integers(1, 3), min_size=num_stages, max_size=num_stages))

    def slowest(cuts: tuple[int, ...]) -> float:
        stages = list(pairwise((0, *cuts, len(costs))))
        return max(
            (sum(costs[a:b]) + first * (i == 0) + last * (i == len(stages) - 1)) / widths[i]
            for i, (a, b) in enumerate(stages)
        )

    best = min(slowest(cuts) for cuts in combinations(range(1, len(costs)), num_stages - 1))
    counts = partition(costs, widths, first, last)
    assert sum(counts) == len(costs)
    assert min(counts) >= 1
    cuts = tuple(sum(counts[: i + 1]) for i in range(num_stages - 1))
    assert slowest(cuts) == pytest.approx(best)


@pytest.mark.parametrize(
    ("counts", "says"),
    [((3, 3), "sums to 6, but the model has 8 layers"), ((8, 0), "leaves a stage empty")],
)
def test_a_bad_layers_list_is_refused(counts: tuple[int, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        stage_specs(counts, 8)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="pipeline_parallel_size=3 exceeds the 2 layers; use at most 2"
    ):
        partition([1, 1], [1, 1, 1])
