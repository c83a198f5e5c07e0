"""Products of rows of which some come while others are multiplied."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from bireme.kernels import late_rows
from bireme.kernels.late_rows import (
    LateRows,
    columns_meanwhile,
    multiply_into,
    rows_in_order,
    whole_rows,
)
from bireme.kernels.linear import gated_linear, linear, linear_in_parts

ROWS, WIDTH, OUTPUTS = 7, 12, 20
SHARES = [slice(0, 3), slice(4, 7), slice(0, 0), slice(0, 7), slice(7, 7)]


class Coming:
    """Rows [T, D] of which those outside `own` are not there before they were waited for."""

    def __init__(self, own: slice) -> None:
        self.all = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(7))
        self.rows = torch.full_like(self.all, torch.nan)
        self.rows[own] = self.all[own]
        self.num_waits = 0
        self.late = LateRows(self.rows, own, self.arrive)

    def arrive(self) -> None:
        self.num_waits += 1
        self.rows.copy_(self.all)


@pytest.fixture(params=["at once", "some outputs meanwhile", "all outputs meanwhile"])
def turns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tiles of one row and four outputs: 5 of the 20 outputs' tiles for each row."""
    by_name = {"at once": 1000, "some outputs meanwhile": 8, "all outputs meanwhile": 20}
    monkeypatch.setattr(late_rows, "_FEWEST_ROWS", 1)
    monkeypatch.setattr(late_rows, "_TILE_ROWS", 1)
    monkeypatch.setattr(late_rows, "_TILE_COLUMNS", 4)
    monkeypatch.setattr(late_rows, "MULTIPROCESSORS", by_name[request.param])


@pytest.mark.usefixtures("turns")
@pytest.mark.parametrize("own", SHARES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_is_that_of_the_whole(own: slice, has_bias: bool) -> None:
    coming, weight = Coming(own), torch.randn(OUTPUTS, WIDTH)
    bias = torch.randn(OUTPUTS) if has_bias else None
    made = linear(coming.late, weight, bias)
    assert coming.num_waits == 1
    torch.testing.assert_close(made, F.linear(coming.all, weight, bias))


@pytest.mark.usefixtures("turns")
def test_products_of_other_kinds() -> None:
    own = SHARES[0]
    weight = torch.randn(OUTPUTS, WIDTH)
    coming = Coming(own)
    torch.testing.assert_close(linear_in_parts(coming.late, weight), coming.all @ weight.T)
    coming = Coming(own)
    expected = gated_linear(coming.all, weight, F.silu)
    torch.testing.assert_close(gated_linear(coming.late, weight, F.silu), expected)
    coming = Coming(own)
    assert torch.equal(whole_rows(coming.late), coming.all)
    assert whole_rows(coming.all) is coming.all


def test_what_the_cases_above_multiply_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(late_rows, "_FEWEST_ROWS", 1)
    monkeypatch.setattr(late_rows, "_TILE_ROWS", 1)
    monkeypatch.setattr(late_rows, "_TILE_COLUMNS", 4)
    found = []
    for multiprocessors in (1000, 8, 20):
        monkeypatch.setattr(late_rows, "MULTIPROCESSORS", multiprocessors)
        found.append([columns_meanwhile(own, ROWS, OUTPUTS) for own in (3, 4)])
    assert found == [[0, 0], [8, 8], [20, 20]]


@pytest.mark.parametrize(
    ("rows", "outputs", "columns"),
    [
        (1024, 5120, 5120), (1024, 28672, 8448),  # halves of a 70B shape's
        (1024, 6144, 6144), (1024, 11008, 8448), (128, 11008, 0),  # of a 7B shape's
        (512, 28672, 16896), (510, 11008, 0), (512, 11008, 11008),
    ],
)  # fmt: skip
def test_columns_of_known_products(rows: int, outputs: int, columns: int) -> None:
    assert columns_meanwhile(rows // 2, rows, outputs) == columns


@pytest.mark.parametrize("own", SHARES)
@pytest.mark.parametrize("multiprocessors", [1, 1000])
def test_a_product_of_which_rows_go_to_another(
    own: slice, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(late_rows, "_FEWEST_ROWS", 1)
    monkeypatch.setattr(late_rows, "_TILE_ROWS", 1)
    monkeypatch.setattr(late_rows, "MULTIPROCESSORS", multiprocessors)
    x, weight, place = (
        torch.randn(ROWS, WIDTH),
        torch.randn(OUTPUTS, WIDTH),
        torch.empty(ROWS, OUTPUTS),
    )
    made = multiply_into(place, x, weight, own)
    assert made.data_ptr() == place.data_ptr()
    torch.testing.assert_close(made, x @ weight.T)


def test_the_other_ranks_rows_come_first_where_that_takes_no_longer() -> None:
    first, second, whole = slice(0, 512), slice(512, 1024), slice(0, 1024)
    assert rows_in_order(first, 1024, 8192) == [second, first]  # of a 70B shape
    assert rows_in_order(second, 1024, 8192) == [first, second]
    assert rows_in_order(second, 1024, 4096) == [
        whole
    ]  # of a 7B shape, which all are made of at once
    assert rows_in_order(whole, 1024, 8192) == [whole]


@given(st.integers(1, 5000), st.integers(1, 40000), st.data())
def test_no_turn_more_than_at_once(rows: int, outputs: int, data: st.DataObject) -> None:
    own = data.draw(st.integers(0, rows))
    columns = columns_meanwhile(own, rows, outputs)
    assert 0 <= columns <= outputs
    if columns:
        assert min(own, rows - own) >= 256  # of fewer, a weight that is read twice takes longer
        parts = [(own, columns), (rows, outputs - columns), (rows - own, columns)]
        assert sum(late_rows._turns(*part) for part in parts) <= late_rows._turns(rows, outputs)
