"""Gemma 2 (arXiv:2408.00118): norms around both blocks, capped scores and logits, alternating
windows, embeddings scaled by sqrt(hidden size)."""

from __future__ import annotations

import torch
from torch import nn

from bireme.model_config import ModelConfig
from bireme.models import llama
from bireme.models.blocks import Family, Head, Layer, RMSNorm, TokenEmbedding
from bireme.models.step import StepContext
from bireme.parallel.layers import VocabParallelEmbedding
from bireme.parallel.mesh import Mesh


def _norm(name: str, config: ModelConfig) -> RMSNorm:
    return RMSNorm(name, config.hidden_size, config.norm_eps, offset=1.0)


class Gemma2Layer(Layer):
    def __init__(self, config: ModelConfig, mesh: Mesh, layer: int) -> None:
        super().__init__()
        name = f"model.layers.{layer}"
        self.input_layernorm = _norm(f"{name}.input_layernorm", config)
        self.self_attn = llama.attention(config, mesh, layer)
        self.post_attention_layernorm = _norm(f"{name}.post_attention_layernorm", config)
        self.pre_feedforward_layernorm = _norm(f"{name}.pre_feedforward_layernorm", config)
        self.mlp = llama.mlp(config, mesh, layer)
        self.post_feedforward_layernorm = _norm(f"{name}.post_feedforward_layernorm", config)

    def forward(self, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        attended = self.self_attn(self.input_layernorm(x), step)
        x = step.of_asked(x) + self.post_attention_layernorm(attended)
        out: torch.Tensor = x + self.post_feedforward_layernorm(
            self.mlp(self.pre_feedforward_layernorm(x))
        )
        return out


def _embedding(config: ModelConfig, mesh: Mesh) -> nn.Module:
    return TokenEmbedding(config, mesh, "model.embed_tokens", scale=config.hidden_size**0.5)


def _head(config: ModelConfig, mesh: Mesh, tied: VocabParallelEmbedding | None) -> Head:
    return Head(config, mesh, _norm("model.norm", config), "lm_head", "model.embed_tokens", tied)


GEMMA2 = Family(_embedding, Gemma2Layer, _head)
