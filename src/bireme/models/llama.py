"""Llama 2 and 3 (arXiv:2307.09288), and the families that differ by a detail: Mistral (sliding
window), Qwen2 (QKV bias), Qwen3 (q/k norm)."""

from __future__ import annotations

import torch
from torch import nn

from bireme.model_config import ModelConfig
from bireme.models.attention import Attention
from bireme.models.blocks import (
    MLP,
    Family,
    Head,
    Layer,
    MoE,
    RMSNorm,
    TokenEmbedding,
    Unsummed,
)
from bireme.models.step import StepContext
from bireme.parallel.layers import VocabParallelEmbedding
from bireme.parallel.mesh import Mesh


def embedding(config: ModelConfig, mesh: Mesh) -> nn.Module:
    return TokenEmbedding(config, mesh, "model.embed_tokens")


def head(config: ModelConfig, mesh: Mesh, tied: VocabParallelEmbedding | None) -> Head:
    norm = RMSNorm("model.norm", config.hidden_size, config.norm_eps)
    return Head(config, mesh, norm, "lm_head", "model.embed_tokens", tied)


def attention(
    config: ModelConfig, mesh: Mesh, layer: int, *, has_qk_norm: bool = False
) -> Attention:
    name = f"model.layers.{layer}.self_attn"

    def norm(part: str) -> RMSNorm | None:
        if not has_qk_norm:
            return None
        return RMSNorm(f"{name}.{part}", config.head_dim, config.norm_eps)

    names = [f"{name}.{part}_proj" for part in "qkv"]
    q_norm, k_norm = norm("q_norm"), norm("k_norm")
    return Attention(config, mesh, layer, names, f"{name}.o_proj", q_norm=q_norm, k_norm=k_norm)


def mlp(config: ModelConfig, mesh: Mesh, layer: int) -> MLP:
    name = f"model.layers.{layer}.mlp"
    return MLP(
        config, mesh, [f"{name}.gate_proj", f"{name}.up_proj"], f"{name}.down_proj", is_gated=True
    )


class PreNormLayer(Layer):
    """x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, config: ModelConfig, layer: int, self_attn: Attention, feed_forward: MLP | MoE
    ) -> None:
        super().__init__()
        name = f"model.layers.{layer}"
        self.input_layernorm = RMSNorm(
            f"{name}.input_layernorm", config.hidden_size, config.norm_eps
        )
        self.self_attn = self_attn
        self.post_attention_layernorm = RMSNorm(
            f"{name}.post_attention_layernorm", config.hidden_size, config.norm_eps
        )
        self.mlp = feed_forward
        self.takes_unsummed = not (self_attn.has_bias or feed_forward.has_bias)

    def forward(self, x: torch.Tensor | Unsummed, step: StepContext) -> torch.Tensor | Unsummed:
        if isinstance(x, Unsummed):
            return self._unsummed(x, step)
        # nothing outlives the sum
        x = step.of_asked(x) + self.self_attn(self.input_layernorm(x), step)
        out: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out

    def _unsummed(self, state: Unsummed, step: StepContext) -> Unsummed:
        group = self.self_attn.group
        x, normed = self.input_layernorm.of_sum(state.x, state.addend, group)
        x = step.of_asked(x)  # before what is added to it: the norm reads it early
        attended = self.self_attn.partial(normed, step)
        x, normed = self.post_attention_layernorm.of_sum(x, attended, group)
        return Unsummed(x, self.mlp.partial(normed))


def _layer(config: ModelConfig, mesh: Mesh, layer: int) -> Layer:
    return PreNormLayer(config, layer, attention(config, mesh, layer), mlp(config, mesh, layer))


def _layer_with_qk_norm(config: ModelConfig, mesh: Mesh, layer: int) -> Layer:
    attn = attention(config, mesh, layer, has_qk_norm=True)
    return PreNormLayer(config, layer, attn, mlp(config, mesh, layer))


LLAMA = Family(embedding, _layer, head)
QWEN3 = Family(embedding, _layer_with_qk_norm, head)
