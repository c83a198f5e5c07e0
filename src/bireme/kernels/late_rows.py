"""Rows of which some are still on their way, and products that begin with the others.

A tensor group's ranks make a share of a sum's rows each, and bring it to one another. What the next product makes of a
rank's own rows need not wait for that.
Shapes: T rows, D elements, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

_MULTIPROCESSORS = 132  # of a Hopper GPU
_TILE_ROWS, _TILE_COLUMNS = 128, 256  # of a product, that a multiprocessor makes at a time


@dataclass(frozen=True)
class LateRows:
    """`rows` [T, D], of which the first or the last ones, `own`, are there; the others once `arrive` was called, in
    the stream that it was called in. It is called before the group's next sum."""

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
        others = slice(self.own.stop, num_rows) if self.own.start == 0 else slice(0, self.own.start)
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


def columns_meanwhile(num_own: int, num_rows: int, num_outputs: int) -> int:
    """Outputs that all multiprocessors make of a rank's own rows in one turn; 0 where the product would take more turns
    in all than it does at once."""
    own_tiles = -(-num_own // _TILE_ROWS)
    columns = min(num_outputs, _MULTIPROCESSORS // max(1, own_tiles) * _TILE_COLUMNS)
    parts = (num_own, columns), (num_rows, num_outputs - columns), (num_rows - num_own, columns)
    return columns if sum(_turns(*part) for part in parts) <= _turns(num_rows, num_outputs) else 0


def _turns(num_rows: int, num_outputs: int) -> int:
    """Of the multiprocessors, until all of a product's tiles are made."""
    tiles = -(-num_rows // _TILE_ROWS) * -(-num_outputs // _TILE_COLUMNS)
    return -(-tiles // _MULTIPROCESSORS)


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
