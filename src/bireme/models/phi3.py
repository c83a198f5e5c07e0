"""Phi-3 (arXiv:2404.14219): Llama with fused QKV and gate-up tensors."""

from __future__ import annotations

from bireme.model_config import ModelConfig
from bireme.models import llama
from bireme.models.attention import Attention
from bireme.models.blocks import MLP, Family, Layer
from bireme.parallel.mesh import Mesh


def _layer(config: ModelConfig, mesh: Mesh, layer: int) -> Layer:
    name = f"model.layers.{layer}"
    attn = Attention(
        config, mesh, layer, [f"{name}.self_attn.qkv_proj"], f"{name}.self_attn.o_proj"
    )
    mlp = MLP(config, mesh, [f"{name}.mlp.gate_up_proj"], f"{name}.mlp.down_proj", is_gated=True)
    return llama.PreNormLayer(config, layer, attn, mlp)


PHI3 = Family(llama.embedding, _layer, llama.head)
