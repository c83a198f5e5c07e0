"""The blocks that families are made of, and the stage that holds them.

Shapes: T tokens, D hidden size, S sampled rows, V local vocabulary, E experts, F local columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from bireme.kernels.functional import ACTIVATIONS, gated, grouped_linear, rms_norm
from bireme.kernels.linear import gated_linear
from bireme.model_config import ModelConfig
from bireme.models.step import StepContext
from bireme.parallel import layout
from bireme.parallel.cuts import column_edges
from bireme.parallel.layers import (
    MergedColumnParallelLinear,
    ParallelHead,
    ParallelModule,
    ReplicatedLinear,
    ReplicatedParameter,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from bireme.parallel.layout import IDENTITY, Rows, Source, StepWork, View
from bireme.parallel.mesh import Mesh, TensorGroup
from bireme.parallel.pipeline import StageSpec


class RMSNorm(ReplicatedParameter):
    """Root-mean-square norm; `offset` 1 where the file holds weight - 1 (Gemma)."""

    def __init__(self, name: str, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__(name, (size,))
        self.eps, self.offset = eps, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps, self.offset)

    def of_sum(
        self, x: torch.Tensor, addend: torch.Tensor | None, group: TensorGroup
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + the group's sum of `addend`, if there is one, and its norm."""
        if addend is None:
            return x, self(x)
        return group.all_reduce_add_norm(addend, x, self.weight, self.eps, self.offset)


class LayerNorm(ParallelModule):
    """Layer norm with weight and bias, or with neither."""

    def __init__(self, name: str, config: ModelConfig) -> None:
        super().__init__()
        self.size, self.eps = (config.hidden_size,), config.norm_eps
        for attribute in ("weight", "bias") if config.has_norm_params else ():
            full_name = f"{name}.{attribute}"
            self.add(attribute, layout.replicated(full_name, Source(full_name, self.size)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(
            x, self.size, self._parameters.get("weight"), self._parameters.get("bias"), self.eps
        )


class MLP(nn.Module):
    """act(x W1) W2, or act(x W_gate) * (x W_up) W2 where `ups` names two parts.

    Column-parallel up, row-parallel down: one all-reduce.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        ups: Sequence[str],
        down: str,
        *,
        is_gated: bool,
        view: View = IDENTITY,
    ) -> None:
        super().__init__()
        size = config.intermediate_size
        fused_name = f"{down.rpartition('.')[0]}.gate_up" if len(ups) > 1 else ups[0]
        self.is_gated = is_gated
        self.activation = ACTIVATIONS[config.activation]
        self.up = MergedColumnParallelLinear(
            fused_name, ups, mesh, config.hidden_size, size,
            num_parts=2 if is_gated else 1, bias=config.has_mlp_bias, view=view,
        )  # fmt: skip
        edges = column_edges(size, mesh.tp_size)
        cut = (edges[mesh.tp_rank], edges[mesh.tp_rank + 1])
        self.num_columns = cut[1] - cut[0]
        self.down = RowParallelLinear(
            down, mesh, cut, size, config.hidden_size,
            unit="MLP column", bias=config.has_mlp_bias, view=view,
        )  # fmt: skip

    @property
    def work(self) -> StepWork:
        """What goes up, activated, and their product."""
        return StepWork(token_elements=(4 if self.is_gated else 2) * self.num_columns)

    @property
    def has_bias(self) -> bool:
        """Behind the sum over ranks."""
        return "bias" in self.down.layouts

    def partial(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's addend [T, D], or parts of it, float32 [P, T, D], with fewer kernels than modules."""
        if self.is_gated and "bias" not in self.up.layouts:
            return self.down.partial(gated_linear(x, self.up.weight, self.activation))
        return self.down.partial(self._up(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(self._up(x))
        return out

    def _up(self, x: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, F], activated."""
        h = self.up(x)
        return gated(h, self.activation) if self.is_gated else self.activation(h)


class MoE(ParallelModule):
    """Routed experts, stacked; each is cut by columns like an MLP, so every rank has all of them.

    `experts` names the tensors (gate, up, down) of one expert.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        name: str,
        experts: Callable[[int], tuple[str, str, str]],
    ) -> None:
        super().__init__()
        assert config.moe is not None
        moe, hidden = config.moe, config.hidden_size
        self.mesh, self.moe = mesh, moe
        self.activation = ACTIVATIONS[config.activation]
        self.gate = ReplicatedLinear(f"{name}.gate", (moe.num_experts, hidden))
        edges = column_edges(moe.intermediate_size, mesh.tp_size)
        cut = (edges[mesh.tp_rank], edges[mesh.tp_rank + 1])
        up_shape, down_shape = (moe.intermediate_size, hidden), (hidden, moe.intermediate_size)
        ups, downs = [], []
        for index in range(moe.num_experts):
            gate, up, down = experts(index)
            rows = [Rows(Source(f"{part}.weight", up_shape), *cut) for part in (gate, up)]
            ups.append(layout.column_layout(name, rows, "MLP column"))
            downs.append(
                layout.row_layout(name, Source(f"{down}.weight", down_shape), cut, "MLP column")
            )
        self.add("gate_up", layout.stack_experts(f"{name}.experts.gate_up", ups))
        self.add("down", layout.stack_experts(f"{name}.experts.down", downs))

    gate_up: nn.Parameter
    down: nn.Parameter
    has_bias = False

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and expert ids [T, num_experts_per_tok]."""
        scores = torch.softmax(self.gate(x), dim=-1, dtype=torch.float32)
        weights, ids = scores.topk(self.moe.num_experts_per_tok, dim=-1)
        if self.moe.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(x.dtype), ids

    @property
    def work(self) -> StepWork:
        """Each token's rows for its experts, in and out and in the order of both."""
        hidden, columns = self.down.shape[1], self.down.shape[2]
        return StepWork(token_elements=self.moe.num_experts_per_tok * (3 * hidden + 4 * columns))

    def partial(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's addend [T, D]: rows sorted by expert, one product a projection for all."""
        weights, ids = self.route(x)
        order = ids.flatten().argsort(stable=True)
        experts = torch.arange(self.moe.num_experts, device=x.device)
        ends = torch.searchsorted(ids.flatten()[order], experts, right=True)  # [E]
        rows = x[order // self.moe.num_experts_per_tok]
        rows = gated(grouped_linear(rows, self.gate_up, ends), self.activation)
        rows = grouped_linear(rows, self.down, ends)
        unsorted = torch.empty_like(rows).index_copy_(0, order, rows).unflatten(0, ids.shape)
        return torch.einsum("tkd,tk->td", unsorted, weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mesh.tensor.all_reduce(self.partial(x))


class TokenEmbedding(nn.Module):
    """Looks ids up, times `scale`. ids [T], positions [T] -> [T, D]"""

    def __init__(
        self, config: ModelConfig, mesh: Mesh, name: str, scale: float | None = None
    ) -> None:
        super().__init__()
        self.tokens = VocabParallelEmbedding(name, mesh, config.vocab_size, config.embedding_dim)
        self.scale = scale

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.tokens(ids)
        if self.scale is None:
            return x
        # the scale is rounded to the activations' type first, as the models were trained
        return x * torch.tensor(self.scale, dtype=x.dtype).item()


class Head(nn.Module):
    """Final norm and logits. [S, D] -> [S, V]"""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        norm: nn.Module | None,
        name: str,
        embedding_name: str,
        embedding: VocabParallelEmbedding | None,
    ) -> None:
        super().__init__()
        self.norm = norm
        source_name = embedding_name if config.tie_word_embeddings else name
        self.logits = ParallelHead(
            source_name,
            mesh,
            config.vocab_size,
            config.embedding_dim,
            tied=embedding if config.tie_word_embeddings else None,
            cap=config.final_softcap,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.norm is not None:
            x = self.norm(x)
        out: torch.Tensor = self.logits(x)
        return out


@dataclass(frozen=True)
class Unsummed:
    """Hidden states [T, D] on their way to the next layer: x, to which the tensor group's sum of `addend`, if there
    is one, [T, D] or parts of it, float32 [P, T, D], is yet to be added. The next norm does both. A rank may hold some
    rows of x alone (`all_reduce_add_norm`)."""

    x: torch.Tensor
    addend: torch.Tensor | None = None


class Layer(nn.Module):
    """One decoder layer: [T, D] -> [T, D], or `Unsummed` to `Unsummed` where it `takes_unsummed`; of the rows [S] that
    the step asks for, if it asks for some."""

    takes_unsummed = False


@dataclass(frozen=True)
class Family:
    """One architecture: how its parts are made, and how its checkpoints are spelled.

    Canonical tensor names start with `prefixes[0]`; files may use any of `prefixes` instead.
    `ignorable` are regular expressions of tensors that a file may hold and nobody needs.
    """

    embedding: Callable[[ModelConfig, Mesh], nn.Module]
    layer: Callable[[ModelConfig, Mesh, int], Layer]
    head: Callable[[ModelConfig, Mesh, VocabParallelEmbedding | None], Head]
    prefixes: tuple[str, ...] = ("model.", "")
    ignorable: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)


class StageModel(nn.Module):
    """The part of a model that one stage holds.

    The first stage takes ids [T], the others hidden states [T, D]; all but the last return hidden
    states; `logits` of the last gives [S, V] of chosen rows.
    """

    def __init__(self, family: Family, config: ModelConfig, mesh: Mesh, spec: StageSpec) -> None:
        super().__init__()
        self.embedding = family.embedding(config, mesh) if spec.has_embedding else None
        self.layers = nn.ModuleDict(
            {
                str(index): family.layer(config, mesh, index)
                for index in range(spec.first_layer, spec.last_layer)
            }
        )
        embedding = self.embedding.tokens if self.embedding is not None else None
        assert embedding is None or isinstance(embedding, VocabParallelEmbedding)
        self.head = family.head(config, mesh, embedding) if spec.has_head else None
        self._group = mesh.tensor
        self.sums_late = False  # layers hand on what is not summed yet

    @property
    def takes_unsummed(self) -> bool:
        return all(layer.takes_unsummed for layer in self.layers.values())

    def forward(self, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        """Where the step asks for some rows, the last layer makes these alone -> [S, D]."""
        if step.asked is None:
            return self._run(self._embedded(x, step), step, [*self.layers.values()])
        return self.end(self.begin(x, replace(step, asked=None)), step)

    def begin(self, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        """All but the last layer."""
        return self._run(self._embedded(x, step), step, [*self.layers.values()][:-1])

    def end(self, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        """The last layer, of what the others made."""
        return self._run(x, step, [*self.layers.values()][-1:])

    def _embedded(self, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        return x if self.embedding is None else self.embedding(x, step.positions)

    def _run(self, x: torch.Tensor, step: StepContext, layers: Sequence[nn.Module]) -> torch.Tensor:
        if self.sums_late and not (step.paged is not None and step.paged.is_probed):
            return self._unsummed(x, step, layers)
        for layer in layers:
            x = layer(x, step)
        return x

    def _unsummed(
        self, x: torch.Tensor, step: StepContext, layers: Sequence[nn.Module]
    ) -> torch.Tensor:
        state = Unsummed(x)
        for layer in layers:
            state = layer(state, step)
        if state.addend is None:
            return state.x
        return self._group.all_reduce_add(state.addend, state.x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        assert self.head is not None
        out: torch.Tensor = self.head(x)
        return out
