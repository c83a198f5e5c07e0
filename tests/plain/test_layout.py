"""Cuts: every element held, none twice, as even as the rules promise."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bireme.errors import ConfigError
from bireme.parallel.boxes import (
    as_slices,
    box_shape,
    check_disjoint,
    full_box,
    intersect,
    relative,
    union_volume,
    volume,
)
from bireme.parallel.cuts import (
    MLP_UNITS,
    HeadCut,
    column_edges,
    head_edges,
    vocabulary_range,
    vocabulary_width,
)
from bireme.parallel.layout import Piece, Source, View

HEADS = st.tuples(st.integers(1, 12), st.integers(1, 6)).map(
    lambda pair: (pair[0] * pair[1], pair[0])
)


@st.composite
def boxes(draw: st.DrawFn, num_dims: int = 2) -> tuple[tuple[int, int], ...]:
    def edge() -> tuple[int, int]:
        start = draw(st.integers(0, 6))
        return start, start + draw(st.integers(1, 5))

    return tuple(edge() for _ in range(num_dims))


@given(HEADS, st.data())
def test_head_edges_give_every_rank_a_head_and_lose_none(
    heads: tuple[int, int], data: st.DataObject
) -> None:
    num_heads, num_kv = heads
    tp = data.draw(st.integers(1, num_heads))
    edges = head_edges(num_heads, num_kv, tp)
    assert edges[0] == 0
    assert edges[-1] == num_heads
    assert len(edges) == tp + 1
    assert all(start < stop for start, stop in pairwise(edges))


@given(st.tuples(st.integers(1, 4), st.integers(1, 3)), st.data())
def test_no_other_head_edges_have_fewer_kv_heads_then_fewer_query_heads(
    shape: tuple[int, int], data: st.DataObject
) -> None:
    num_kv, per_kv = shape
    num_heads = num_kv * per_kv
    tp = data.draw(st.integers(1, num_heads))

    def cost(edges: tuple[int, ...]) -> tuple[int, int]:
        cuts = [HeadCut(num_heads, num_kv, 1, pair) for pair in pairwise(edges)]
        return max(cut.num_local_kv_heads for cut in cuts), max(cut.num_local_heads for cut in cuts)

    def all_edges(start: int, left: int) -> list[tuple[int, ...]]:
        if left == 1:
            return [(start, num_heads)]
        return [
            (start, *rest)
            for stop in range(start + 1, num_heads - left + 2)
            for rest in all_edges(stop, left - 1)
        ]

    best = min(cost(edges) for edges in all_edges(0, tp))
    assert cost(head_edges(num_heads, num_kv, tp)) == best


@given(HEADS, st.data())
def test_head_map_points_each_query_head_at_its_own_kv_head(
    heads: tuple[int, int], data: st.DataObject
) -> None:
    num_heads, num_kv = heads
    edges = head_edges(num_heads, num_kv, data.draw(st.integers(1, num_heads)))
    for queries in pairwise(edges):
        cut = HeadCut(num_heads, num_kv, 4, queries)
        for local, head in enumerate(range(*queries)):
            assert cut.kv[0] + cut.head_map[local] == head // (num_heads // num_kv)


def test_more_ranks_than_heads_are_refused_with_both_numbers() -> None:
    with pytest.raises(
        ConfigError, match=r"tensor_parallel_size=9 exceeds the 8 query heads; use at most 8"
    ):
        head_edges(8, 4, 9)


@given(st.integers(1, 20_000), st.data())
def test_column_edges_cover_all_columns_on_multiples_of_a_unit(
    size: int, data: st.DataObject
) -> None:
    tp = data.draw(st.integers(1, min(size, 16)))
    edges = column_edges(size, tp)
    widths = [stop - start for start, stop in pairwise(edges)]
    assert (edges[0], edges[-1]) == (0, size)
    assert min(widths) > 0
    unit = max(unit for unit in MLP_UNITS if all(edge % unit == 0 for edge in edges[1:-1]))
    assert max(widths) * tp / size - 1 < 0.05 or unit == 1 or max(widths) == -(-size // tp)


@given(st.integers(1, 5000), st.integers(1, 16))
def test_vocabulary_is_cut_into_equal_padded_widths(vocab: int, tp: int) -> None:
    width = vocabulary_width(vocab, tp)
    ranges = [vocabulary_range(vocab, tp, rank) for rank in range(tp)]
    assert width % 64 == 0
    assert [start for rank in ranges for start in range(*rank)] == list(range(vocab))
    assert all(stop - start <= width for start, stop in ranges)


@given(boxes(), boxes())
def test_an_intersection_lies_in_both_boxes(
    a: tuple[tuple[int, int], ...], b: tuple[tuple[int, int], ...]
) -> None:
    grid = np.zeros((12, 12), dtype=int)
    grid[as_slices(a)] += 1
    grid[as_slices(b)] += 1
    common = intersect(a, b)
    assert (volume(common) if common else 0) == int((grid == 2).sum())


@given(st.lists(boxes(), max_size=6))
def test_union_volume_counts_each_element_once(found: list[tuple[tuple[int, int], ...]]) -> None:
    grid = np.zeros((12, 12), dtype=bool)
    for box in found:
        grid[as_slices(box)] = True
    assert union_volume(set(found)) == int(grid.sum())


@given(st.lists(boxes(), max_size=5))
def test_check_disjoint_finds_any_overlap(found: list[tuple[tuple[int, int], ...]]) -> None:
    grid = np.zeros((12, 12), dtype=int)
    for box in found:
        grid[as_slices(box)] += 1
    if (grid > 1).any():
        with pytest.raises(ConfigError, match="filled twice"):
            check_disjoint("x", list(found))
    else:
        check_disjoint("x", list(found))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.data())
def test_every_view_is_inverted_by_its_file_boxes(
    num_heads: int, unit: int, columns: int, data: st.DataObject
) -> None:
    rows = 3 * num_heads * unit
    logical = np.arange(rows * columns).reshape(rows, columns)
    interleaved = (
        logical.reshape(3, num_heads, unit, columns).transpose(1, 0, 2, 3).reshape(rows, columns)
    )
    files = {
        View(): logical,
        View("transpose"): logical.T,
        View("interleave", 3, unit): interleaved,
    }
    start = data.draw(st.integers(0, rows - 1))
    box = (
        (start, data.draw(st.integers(start + 1, rows))),
        (0, data.draw(st.integers(1, columns))),
    )
    for view, file in files.items():
        out = np.full(box_shape(box), -1)
        for file_box, inner in view.file_boxes(box, logical.shape):
            part = file[as_slices(file_box)]
            out[as_slices(inner)] = part.T if view.kind == "transpose" else part
        assert (out == logical[as_slices(box)]).all()
        assert View.parse(str(view)) == view


def test_a_piece_that_leaves_its_source_is_refused() -> None:
    from bireme.parallel.layout import ParamLayout

    source = Source("w", (4, 4))
    piece = Piece(source, ((2, 6), (0, 4)), ((0, 4), (0, 4)))
    with pytest.raises(ConfigError, match=r"leaves the shape \(4, 4\)"):
        ParamLayout("p", (4, 4), (piece,), "column", "row").check()
    assert relative(((2, 6),), ((1, 9),)) == ((1, 5),)
    assert full_box((2, 3)) == ((0, 2), (0, 3))
