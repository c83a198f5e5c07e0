"""BLOOM (arXiv:2211.05100): ALiBi, a norm after the embedding, QKV interleaved by head."""

from __future__ import annotations

import torch

from bireme.model_config import ModelConfig
from bireme.models.attention import Attention
from bireme.models.blocks import MLP, Family, Head, Layer, LayerNorm, TokenEmbedding
from bireme.models.step import StepContext
from bireme.parallel.layers import VocabParallelEmbedding
from bireme.parallel.layout import View
from bireme.parallel.mesh import Mesh


class BloomLayer(Layer):
    def __init__(self, config: ModelConfig, mesh: Mesh, layer: int) -> None:
        super().__init__()
        name = f"transformer.h.{layer}"
        self.input_layernorm = LayerNorm(f"{name}.input_layernorm", config)
        self.self_attention = Attention(
            config,
            mesh,
            layer,
            [f"{name}.self_attention.query_key_value"],
            f"{name}.self_attention.dense",
            view=View("interleave", 3, config.head_dim),
            has_alibi=True,
        )
        self.post_attention_layernorm = LayerNorm(f"{name}.post_attention_layernorm", config)
        self.mlp = MLP(
            config, mesh, [f"{name}.mlp.dense_h_to_4h"], f"{name}.mlp.dense_4h_to_h", is_gated=False
        )
        self.has_residual_after_norm = config.has_residual_after_norm

    def forward(self, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        normed = self.input_layernorm(x)
        attended = self.self_attention(normed, step)
        x = step.of_asked(normed if self.has_residual_after_norm else x) + attended
        normed = self.post_attention_layernorm(x)
        out: torch.Tensor = (normed if self.has_residual_after_norm else x) + self.mlp(normed)
        return out


class BloomEmbedding(TokenEmbedding):
    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        super().__init__(config, mesh, "transformer.word_embeddings")
        self.norm = LayerNorm("transformer.word_embeddings_layernorm", config)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(super().forward(ids, positions))
        return out


def _head(config: ModelConfig, mesh: Mesh, tied: VocabParallelEmbedding | None) -> Head:
    norm = LayerNorm("transformer.ln_f", config)
    return Head(config, mesh, norm, "lm_head", "transformer.word_embeddings", tied)


BLOOM = Family(BloomEmbedding, BloomLayer, _head, prefixes=("transformer.", ""), ignorable=())
