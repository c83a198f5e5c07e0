"""GPT-2: learned positions, fused QKV, weights stored [in, out] (Conv1D)."""

from __future__ import annotations

import torch
from torch import nn

from bireme.model_config import ModelConfig
from bireme.models.attention import Attention
from bireme.models.blocks import MLP, Family, Head, Layer, LayerNorm, TokenEmbedding
from bireme.models.step import StepContext
from bireme.parallel.layers import ReplicatedParameter, VocabParallelEmbedding
from bireme.parallel.layout import TRANSPOSE
from bireme.parallel.mesh import Mesh


class LearnedPositions(TokenEmbedding):
    """Token embedding plus a table of positions."""

    def __init__(self, config: ModelConfig, mesh: Mesh, name: str, positions: str) -> None:
        super().__init__(config, mesh, name)
        self.offset = config.position_offset
        rows = config.max_position_embeddings + config.position_offset
        self.positions = ReplicatedParameter(positions, (rows, config.hidden_size))

    def position_rows(self, positions: torch.Tensor) -> torch.Tensor:
        return self.positions.weight[positions + self.offset]

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return super().forward(ids, positions) + self.position_rows(positions)


class GPT2Layer(Layer):
    def __init__(self, config: ModelConfig, mesh: Mesh, layer: int) -> None:
        super().__init__()
        name = f"transformer.h.{layer}"
        self.ln_1 = LayerNorm(f"{name}.ln_1", config)
        self.attn = Attention(
            config,
            mesh,
            layer,
            [f"{name}.attn.c_attn"],
            f"{name}.attn.c_proj",
            view=TRANSPOSE,
            out_view=TRANSPOSE,
        )
        self.ln_2 = LayerNorm(f"{name}.ln_2", config)
        self.mlp = MLP(
            config, mesh, [f"{name}.mlp.c_fc"], f"{name}.mlp.c_proj", is_gated=False, view=TRANSPOSE
        )

    def forward(self, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        x = step.of_asked(x) + self.attn(self.ln_1(x), step)
        out: torch.Tensor = x + self.mlp(self.ln_2(x))
        return out


def _embedding(config: ModelConfig, mesh: Mesh) -> nn.Module:
    return LearnedPositions(config, mesh, "transformer.wte", "transformer.wpe")


def _head(config: ModelConfig, mesh: Mesh, tied: VocabParallelEmbedding | None) -> Head:
    return Head(
        config, mesh, LayerNorm("transformer.ln_f", config), "lm_head", "transformer.wte", tied
    )


GPT2 = Family(
    _embedding,
    GPT2Layer,
    _head,
    prefixes=("transformer.", ""),
    ignorable=(r"\.attn\.(masked_)?bias$",),
)
