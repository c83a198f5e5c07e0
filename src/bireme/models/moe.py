"""Mixtral (arXiv:2401.04088) and Qwen3-MoE: Llama and Qwen3 layers with routed experts."""

from __future__ import annotations

from bireme.model_config import ModelConfig
from bireme.models import llama
from bireme.models.blocks import Family, Layer, MoE
from bireme.parallel.mesh import Mesh


def _mixtral_layer(config: ModelConfig, mesh: Mesh, layer: int) -> Layer:
    name = f"model.layers.{layer}.block_sparse_moe"

    def expert(index: int) -> tuple[str, str, str]:
        return (
            f"{name}.experts.{index}.w1",
            f"{name}.experts.{index}.w3",
            f"{name}.experts.{index}.w2",
        )

    attn = llama.attention(config, mesh, layer)
    return llama.PreNormLayer(config, layer, attn, MoE(config, mesh, name, expert))


def _qwen3_moe_layer(config: ModelConfig, mesh: Mesh, layer: int) -> Layer:
    name = f"model.layers.{layer}.mlp"

    def expert(index: int) -> tuple[str, str, str]:
        gate, up, down = (f"{name}.experts.{index}.{part}_proj" for part in ("gate", "up", "down"))
        return gate, up, down

    attn = llama.attention(config, mesh, layer, has_qk_norm=True)
    is_sparse = config.moe is not None and config.moe.is_sparse[layer]
    mlp = MoE(config, mesh, name, expert) if is_sparse else llama.mlp(config, mesh, layer)
    return llama.PreNormLayer(config, layer, attn, mlp)


MIXTRAL = Family(llama.embedding, _mixtral_layer, llama.head)
QWEN3_MOE = Family(llama.embedding, _qwen3_moe_layer, llama.head)
