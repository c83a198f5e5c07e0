"""OPT (arXiv:2205.01068): learned positions with an offset of 2; the 350M model norms after each
block and embeds in fewer dims."""

from __future__ import annotations

import torch
from torch import nn

from bireme.model_config import ModelConfig
from bireme.models.attention import Attention
from bireme.models.blocks import MLP, Family, Head, Layer, LayerNorm
from bireme.models.gpt2 import LearnedPositions
from bireme.models.step import StepContext
from bireme.parallel.layers import ReplicatedLinear, VocabParallelEmbedding
from bireme.parallel.mesh import Mesh


class OPTLayer(Layer):
    def __init__(self, config: ModelConfig, mesh: Mesh, layer: int) -> None:
        super().__init__()
        name = f"model.decoder.layers.{layer}"
        names = [f"{name}.self_attn.{part}_proj" for part in "qkv"]
        self.is_norm_first = config.is_norm_first
        self.self_attn = Attention(config, mesh, layer, names, f"{name}.self_attn.out_proj")
        self.self_attn_layer_norm = LayerNorm(f"{name}.self_attn_layer_norm", config)
        self.mlp = MLP(config, mesh, [f"{name}.fc1"], f"{name}.fc2", is_gated=False)
        self.final_layer_norm = LayerNorm(f"{name}.final_layer_norm", config)

    def forward(self, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        out: torch.Tensor
        if self.is_norm_first:
            x = step.of_asked(x) + self.self_attn(self.self_attn_layer_norm(x), step)
            out = x + self.mlp(self.final_layer_norm(x))
            return out
        x = self.self_attn_layer_norm(step.of_asked(x) + self.self_attn(x, step))
        out = self.final_layer_norm(x + self.mlp(x))
        return out


class OPTEmbedding(LearnedPositions):
    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        super().__init__(
            config, mesh, "model.decoder.embed_tokens", "model.decoder.embed_positions"
        )
        shape = (config.hidden_size, config.embedding_dim)
        is_narrow = config.embedding_dim != config.hidden_size
        self.project_in = ReplicatedLinear("model.decoder.project_in", shape) if is_narrow else None

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        if self.project_in is not None:
            x = self.project_in(x)
        out: torch.Tensor = x + self.position_rows(positions)
        return out


def _head(config: ModelConfig, mesh: Mesh, tied: VocabParallelEmbedding | None) -> Head:
    parts: list[nn.Module] = []
    if config.has_final_norm:
        parts.append(LayerNorm("model.decoder.final_layer_norm", config))
    if config.embedding_dim != config.hidden_size:
        parts.append(
            ReplicatedLinear(
                "model.decoder.project_out", (config.embedding_dim, config.hidden_size)
            )
        )
    return Head(config, mesh, nn.Sequential(*parts), "lm_head", "model.decoder.embed_tokens", tied)


OPT = Family(OPTEmbedding, OPTLayer, _head, prefixes=("model.decoder.", "decoder."), ignorable=())
