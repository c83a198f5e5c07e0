"""Layers that are cut over a tensor group. How each is cut is visible where it is made.

Each layer knows the `ParamLayout` of its parameters and gets a mesh value; none asks for a rank
while running, and none communicates while it is made. Weights are [out, in].
Shapes: T tokens, D hidden size, V vocabulary rows of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from bireme.kernels.functional import softcap
from bireme.kernels.linear import can_be_packed, linear, linear_in_parts, pack
from bireme.parallel import layout
from bireme.parallel.cuts import HeadCut, column_edges, vocabulary_range
from bireme.parallel.layout import IDENTITY, ParamLayout, Rows, Source, View
from bireme.parallel.mesh import Mesh


class ParallelModule(nn.Module):
    """A module whose parameters know their layout (`layouts[attribute]`)."""

    def __init__(self) -> None:
        super().__init__()
        self.layouts: dict[str, ParamLayout] = {}

    def add(self, attribute: str, param_layout: ParamLayout) -> None:
        """Registers an empty parameter of that layout, of the default dtype and device."""
        self.layouts[attribute] = param_layout
        parameter = nn.Parameter(torch.empty(param_layout.shape), requires_grad=False)
        self.register_parameter(attribute, parameter)


def named_layouts(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, ParamLayout]]:
    """(parameter name, module, attribute, layout) of every parameter, in construction order."""
    for prefix, module in model.named_modules():
        if isinstance(module, ParallelModule):
            for attribute, param_layout in module.layouts.items():
                yield f"{prefix}.{attribute}".lstrip("."), module, attribute, param_layout


def materialise(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Gives the parameters of a model that was built on meta their memory, uninitialised."""
    for _, module, attribute, param_layout in named_layouts(model):
        storage = torch.empty(param_layout.shape, dtype=dtype, device=device)
        setattr(module, attribute, nn.Parameter(storage, requires_grad=False))


def pack_weights(model: nn.Module) -> None:
    """Brings what is only multiplied by into the order that a CPU multiplies fastest by."""
    for module in model.modules():
        if not isinstance(module, ColumnParallelLinear | RowParallelLinear | ParallelHead):
            continue
        weight = module._parameters.get("weight")  # none of its own in a tied head
        if weight is not None and can_be_packed(weight):
            module.weight = nn.Parameter(pack(weight), requires_grad=False)


class ReplicatedParameter(ParallelModule):
    """A tensor that every rank holds whole: norms, routers, learned positions."""

    def __init__(
        self, name: str, shape: Sequence[int], *, bias: bool = False, view: View = IDENTITY
    ) -> None:
        super().__init__()
        self.add(
            "weight",
            layout.replicated(f"{name}.weight", Source(f"{name}.weight", tuple(shape), view)),
        )
        if bias:
            self.add(
                "bias", layout.replicated(f"{name}.bias", Source(f"{name}.bias", tuple(shape[:1])))
            )

    weight: nn.Parameter
    bias: nn.Parameter


class ReplicatedLinear(ReplicatedParameter):
    """y = x W^T + b, whole on every rank."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self._parameters.get("bias"))


class ColumnParallelLinear(ParallelModule):
    """Cuts the outputs: rank r computes its segments of rows of W, and adds its part of b.

    [T, in] -> [T, local out]
    """

    def __init__(self, name: str, weight: list[Rows], bias: list[Rows] | None, unit: str) -> None:
        super().__init__()
        self.add("weight", layout.column_layout(f"{name}.weight", weight, unit))
        if bias:
            self.add("bias", layout.column_layout(f"{name}.bias", bias, unit))

    weight: nn.Parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self._parameters.get("bias"))

    def in_parts(self, x: torch.Tensor) -> torch.Tensor:
        """The same as a sum that whoever reads it makes, float32 [P, T, local out], where that is quicker."""
        return self(x) if "bias" in self.layouts else linear_in_parts(x, self.weight)


class QKVParallelLinear(ColumnParallelLinear):
    """Query rows of this rank's heads, then key rows, then value rows of the KV heads they read.

    `names` is three tensors (q, k, v) or one that holds them fused, seen through `view`.
    """

    def __init__(
        self,
        name: str,
        names: Sequence[str],
        cut: HeadCut,
        in_features: int,
        *,
        bias: bool,
        view: View = IDENTITY,
    ) -> None:
        weight = self._rows([f"{source}.weight" for source in names], cut, (in_features,), view)
        biases = self._rows([f"{source}.bias" for source in names], cut, (), view) if bias else None
        super().__init__(name, weight, biases, "query head")
        self.sizes = [cut.num_local_heads * cut.head_dim] + [
            cut.num_local_kv_heads * cut.head_dim
        ] * 2

    @staticmethod
    def _rows(names: list[str], cut: HeadCut, rest: tuple[int, ...], view: View) -> list[Rows]:
        counts = [cut.num_heads, cut.num_kv_heads, cut.num_kv_heads]
        starts = [0, 0, 0]
        if len(names) == 1:
            fused = Source(names[0], (sum(counts) * cut.head_dim, *rest), view)
            sources, starts = [fused] * 3, [0, counts[0], counts[0] + counts[1]]
        else:
            sources = [
                Source(name, (count * cut.head_dim, *rest), view)
                for name, count in zip(names, counts, strict=True)
            ]
        return [
            Rows(source, (start + first) * cut.head_dim, (start + last) * cut.head_dim)
            for source, start, (first, last) in zip(
                sources, starts, (cut.queries, cut.kv, cut.kv), strict=True
            )
        ]

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What `forward` made -> q [T, local heads * head_dim], k and v [T, local KV heads * head_dim]."""
        parts: tuple[torch.Tensor, ...] = rows.split(self.sizes, dim=-1)
        return parts


class MergedColumnParallelLinear(ColumnParallelLinear):
    """One or more column-cut matrices of equal size (gate and up) in one product.

    `names` is one tensor each, or a single one that holds `num_parts` of them stacked.
    """

    def __init__(
        self,
        name: str,
        names: Sequence[str],
        mesh: Mesh,
        in_features: int,
        out_features: int,
        *,
        num_parts: int = 1,
        bias: bool = False,
        view: View = IDENTITY,
    ) -> None:
        edges = column_edges(out_features, mesh.tp_size)
        cut = (edges[mesh.tp_rank], edges[mesh.tp_rank + 1])

        def rows(suffix: str, rest: tuple[int, ...]) -> list[Rows]:
            if len(names) == num_parts:
                sources = [
                    Source(f"{part}.{suffix}", (out_features, *rest), view) for part in names
                ]
                return [Rows(source, *cut) for source in sources]
            fused = Source(f"{names[0]}.{suffix}", (num_parts * out_features, *rest), view)
            return [
                Rows(fused, part * out_features + cut[0], part * out_features + cut[1])
                for part in range(num_parts)
            ]

        super().__init__(
            name, rows("weight", (in_features,)), rows("bias", ()) if bias else None, "MLP column"
        )


class RowParallelLinear(ParallelModule):
    """Cuts the inputs: each rank multiplies its columns of W, the group sums, then b is added once.

    [T, local in] -> [T, out]
    """

    def __init__(
        self,
        name: str,
        mesh: Mesh,
        columns: tuple[int, int],
        in_features: int,
        out_features: int,
        *,
        unit: str,
        bias: bool,
        view: View = IDENTITY,
    ) -> None:
        super().__init__()
        self.mesh = mesh
        source = Source(f"{name}.weight", (out_features, in_features), view)
        self.add("weight", layout.row_layout(f"{name}.weight", source, columns, unit))
        if bias:
            self.add(
                "bias", layout.replicated(f"{name}.bias", Source(f"{name}.bias", (out_features,)))
            )

    weight: nn.Parameter
    bias: nn.Parameter

    def partial(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's addend [T, D], of a sum that adds something else too, or parts of it, float32 [P, T, D]."""
        group = self.mesh.tensor
        place = group.place_of_addends(len(x), len(self.weight), x.dtype)
        if place is not None:
            return torch.mm(x, self.weight.t(), out=place)
        multiply = linear_in_parts if group.takes_parts(len(x)) else linear
        return multiply(x, self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.mesh.tensor.all_reduce(linear(x, self.weight))
        return out + self.bias if "bias" in self.layouts else out


class VocabParallelEmbedding(ParallelModule):
    """Each rank looks up the ids of its vocabulary rows; the group sums. ids [T] -> [T, D]"""

    def __init__(self, name: str, mesh: Mesh, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.mesh = mesh
        source = Source(f"{name}.weight", (vocab_size, dim))
        self.add(
            "weight", layout.vocabulary_layout(f"{name}.weight", source, mesh.tp_size, mesh.tp_rank)
        )
        self.first, self.last = vocabulary_range(vocab_size, mesh.tp_size, mesh.tp_rank)

    weight: nn.Parameter

    def partial(self, ids: torch.Tensor) -> torch.Tensor:
        """This rank's addend: zero rows for the ids of other ranks."""
        if self.mesh.tp_size == 1:
            return F.embedding(ids, self.weight)
        is_mine = (ids >= self.first) & (ids < self.last)
        rows = F.embedding((ids - self.first).where(is_mine, 0), self.weight)
        return rows.masked_fill_(~is_mine.unsqueeze(-1), 0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.mesh.tensor.all_reduce(self.partial(ids))


class ParallelHead(ParallelModule):
    """Logits of this rank's vocabulary rows, -inf on padding. [S, D] -> [S, V]

    `tied` shares the embedding's parameter where both ends are on one stage; `cap` caps softly.
    """

    def __init__(
        self,
        name: str,
        mesh: Mesh,
        vocab_size: int,
        dim: int,
        *,
        tied: VocabParallelEmbedding | None = None,
        cap: float | None = None,
    ) -> None:
        super().__init__()
        self.cap = cap
        first, last = vocabulary_range(vocab_size, mesh.tp_size, mesh.tp_rank)
        self.first_id, self.num_real = first, last - first
        self._tied = [tied] if tied is not None else []  # a list: not registered a second time
        if tied is None:
            source = Source(f"{name}.weight", (vocab_size, dim))
            self.add(
                "weight",
                layout.vocabulary_layout(f"{name}.weight", source, mesh.tp_size, mesh.tp_rank),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = linear(x, self._tied[0].weight if self._tied else self.weight)
        if self.cap is not None:
            logits = softcap(logits, self.cap)
        logits[:, self.num_real :] = float("-inf")
        return logits

    weight: nn.Parameter
