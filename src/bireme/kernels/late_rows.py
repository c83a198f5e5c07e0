"""Rows of which some are on their way over a link, and products that go on meanwhile.

Two ranks make a share of a sum's rows each. The product before begins with the rows that are for the other rank; the
one behind with this rank's own.
Shapes: T rows, D elements, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bireme.kernels.choice import MULTIPROCESSORS

# of a part of a product: fewer take little longer than the weight takes to be read, which each part reads
_FEWEST_ROWS = 256
_TILE_ROWS, _TILE_COLUMNS = 128, 256  # of a product, that a multiprocessor makes at a time


@dataclass(frozen=True)
class LateRows:
    """`rows` [T, D], of which the first or the last ones, `own`, are there; the others once `arrive` was called, in
    the stream that it was called in. It must be called before the group's next sum."""

    rows: torch.Tensor
    own: slice
    arrive: Callable[[], None]

    def whole(self) -> torch.Tensor:
        self.arrive()
        return self.rows

    def times(self, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x W^T + b: by [N, D] -> [T, N]"""
        num_rows, num_own = len(self.rows), self.own.stop - self.own.start
        columns = columns_meanwhile(num_own, num_rows, len(weight))
        out = self.rows.new_empty(num_rows, len(weight))
        others = others_of(self.own, num_rows)
        first, rest = slice(0, columns), slice(columns, len(weight))
        if columns:
            _multiply(self.rows, weight, bias, out, self.own, first)
        self.arrive()
        if columns < len(weight):
            _multiply(self.rows, weight, bias, out, slice(0, num_rows), rest)
        if columns:
            _multiply(self.rows, weight, bias, out, others, first)
        return out


def whole_rows(x: torch.Tensor | LateRows) -> torch.Tensor:
    return x.whole() if isinstance(x, LateRows) else x


def others_of(own: slice, num_rows: int) -> slice:
    """The rows that are not among the first or the last ones, `own`."""
    return slice(own.stop, num_rows) if own.start == 0 else slice(0, own.start)


def multiply_into(
    place: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, own: slice
) -> torch.Tensor:
    """x W^T [T, N] into `place`, whose rows beside `own` lie with another rank."""
    for rows in rows_in_order(own, len(x), len(weight)):
        torch.mm(x[rows], weight.t(), out=place[rows])
    return place


def rows_in_order(own: slice, num_rows: int, num_outputs: int) -> list[slice]:
    """Of a product whose rows beside `own` go over a link: these first; all at once where that takes less."""
    parts = [others_of(own, num_rows), own]
    sizes = [part.stop - part.start for part in parts]
    turns = sum(_turns(size, num_outputs) for size in sizes)
    if not are_parts_worth(*sizes) or turns > _turns(num_rows, num_outputs):
        return [slice(0, num_rows)]
    return parts


def are_parts_worth(*sizes: int) -> bool:
    """Whether products of so many rows each take about as long as one of all of them."""
    return min(sizes) >= _FEWEST_ROWS


def columns_meanwhile(num_own: int, num_rows: int, num_outputs: int) -> int:
    """Outputs that all multiprocessors make of a rank's own rows in one turn; 0 where the product would take longer in
    all than it does at once."""
    if not are_parts_worth(num_own, num_rows - num_own):
        return 0
    own_tiles = -(-num_own // _TILE_ROWS)
    columns = min(num_outputs, MULTIPROCESSORS // own_tiles * _TILE_COLUMNS)
    parts = (num_own, columns), (num_rows, num_outputs - columns), (num_rows - num_own, columns)
    return columns if sum(_turns(*part) for part in parts) <= _turns(num_rows, num_outputs) else 0


def _turns(num_rows: int, num_outputs: int) -> int:
    """Of the multiprocessors, until all of a product's tiles are made."""
    tiles = -(-num_rows // _TILE_ROWS) * -(-num_outputs // _TILE_COLUMNS)
    return -(-tiles // MULTIPROCESSORS)


def _multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    rows: slice,
    columns: slice,
) -> None:
    """These rows and columns of the product."""
    given, place = (x[rows], weight[columns].t()), out[rows, columns]
    if bias is None:
        torch.mm(*given, out=place)
    else:
        torch.addmm(bias[columns], *given, out=place)
