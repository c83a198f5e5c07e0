"""GPT-NeoX and Pythia (arXiv:2204.06745): attention and MLP in parallel, partial rotary, QKV
interleaved by head."""

from __future__ import annotations

import torch
from torch import nn

from bireme.model_config import ModelConfig
from bireme.models.attention import Attention
from bireme.models.blocks import MLP, Family, Head, Layer, LayerNorm, TokenEmbedding
from bireme.models.step import StepContext
from bireme.parallel.layers import VocabParallelEmbedding
from bireme.parallel.layout import View
from bireme.parallel.mesh import Mesh


class GPTNeoXLayer(Layer):
    def __init__(self, config: ModelConfig, mesh: Mesh, layer: int) -> None:
        super().__init__()
        name = f"gpt_neox.layers.{layer}"
        self.input_layernorm = LayerNorm(f"{name}.input_layernorm", config)
        self.post_attention_layernorm = LayerNorm(f"{name}.post_attention_layernorm", config)
        self.attention = Attention(
            config,
            mesh,
            layer,
            [f"{name}.attention.query_key_value"],
            f"{name}.attention.dense",
            view=View("interleave", 3, config.head_dim),
        )
        self.mlp = MLP(
            config, mesh, [f"{name}.mlp.dense_h_to_4h"], f"{name}.mlp.dense_4h_to_h", is_gated=False
        )
        self.has_parallel_residual = config.has_parallel_residual

    def forward(self, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        attended = self.attention(self.input_layernorm(x), step)
        x = step.of_asked(x)
        base = x if self.has_parallel_residual else x + attended
        out: torch.Tensor = base + self.mlp(self.post_attention_layernorm(base))
        return out + attended if self.has_parallel_residual else out


def _embedding(config: ModelConfig, mesh: Mesh) -> nn.Module:
    return TokenEmbedding(config, mesh, "gpt_neox.embed_in")


def _head(config: ModelConfig, mesh: Mesh, tied: VocabParallelEmbedding | None) -> Head:
    norm = LayerNorm("gpt_neox.final_layer_norm", config)
    return Head(config, mesh, norm, "embed_out", "gpt_neox.embed_in", tied)


GPT_NEOX = Family(
    _embedding,
    GPTNeoXLayer,
    _head,
    prefixes=("gpt_neox.", ""),
    ignorable=(r"rotary_emb\.inv_freq$", r"\.attention\.(masked_)?bias$"),
)
