"""A layout as a table: what is cut along what, what each rank holds, how even it is.

Layers of the same kind share a row: their number is written as N.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bireme.parallel.layout import ModelLayout, ParamLayout, RankLayout


@dataclass(frozen=True)
class ParamRow:
    """One kind of parameter in one stage; counts are elements on each rank of the stage."""

    name: str
    stages: str
    num_layers: int
    cut: str
    unit: str
    num_pieces: int
    shapes: tuple[tuple[int, ...], ...]
    elements: tuple[int, ...]
    padding: tuple[int, ...]

    @property
    def imbalance(self) -> float:
        """Largest over mean, less one."""
        return max(self.elements) * len(self.elements) / max(1, sum(self.elements)) - 1


def kind_of(name: str) -> str:
    """'model.layers.7.mlp.down_proj.weight' -> 'model.layers.N.mlp.down_proj.weight'"""
    return re.sub(r"\.\d+\.", ".N.", name, count=1)


def param_rows(layout: ModelLayout) -> list[ParamRow]:
    """Rows in the model's order; stages that hold a kind alike share a row."""
    rows: dict[tuple[object, ...], list[tuple[int, int, list[ParamLayout]]]] = {}
    for stage in range(len(layout.widths)):
        ranks = [rank for rank in layout.ranks if rank.stage == stage]
        for kind, (count, params) in _kinds(ranks).items():
            key = (kind, tuple((param.shape, param.num_padding) for param in params))
            rows.setdefault(key, []).append((stage, count, params))
    return [_row(str(key[0]), found) for key, found in rows.items()]


def _kinds(ranks: list[RankLayout]) -> dict[str, tuple[int, list[ParamLayout]]]:
    """kind -> (how many layers have it, one layer's parameter on each rank)."""
    kinds: dict[str, tuple[int, list[ParamLayout]]] = {}
    for position, param in enumerate(ranks[0].params):
        kind = kind_of(param.name)
        count, params = kinds.get(kind, (0, [rank.params[position] for rank in ranks]))
        kinds[kind] = (count + 1, params)
    return kinds


def _row(kind: str, found: list[tuple[int, int, list[ParamLayout]]]) -> ParamRow:
    params = found[0][2]
    stages = [stage for stage, _, _ in found]
    is_run = len(stages) > 2 and stages == list(range(stages[0], stages[-1] + 1))
    return ParamRow(
        name=kind,
        stages=f"{stages[0]}-{stages[-1]}" if is_run else ",".join(map(str, stages)),
        num_layers=sum(count for _, count, _ in found),
        cut=params[0].cut,
        unit=params[0].unit,
        num_pieces=max(len(param.pieces) for param in params),
        shapes=tuple(param.shape for param in params),
        elements=tuple(param.num_elements for param in params),
        padding=tuple(param.num_padding for param in params),
    )
