"""Which families there are, and how a model is cut into stages and ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import torch

from bireme.config import ParallelConfig
from bireme.errors import ConfigError
from bireme.model_config import ModelConfig
from bireme.models.attention import PagedAttention
from bireme.models.blocks import Family, StageModel
from bireme.models.bloom import BLOOM
from bireme.models.gemma2 import GEMMA2
from bireme.models.gpt2 import GPT2
from bireme.models.gpt_neox import GPT_NEOX
from bireme.models.llama import LLAMA, QWEN3
from bireme.models.moe import MIXTRAL, QWEN3_MOE
from bireme.models.opt import OPT
from bireme.models.phi3 import PHI3
from bireme.parallel.layers import named_layouts
from bireme.parallel.layout import ModelLayout, RankLayout
from bireme.parallel.mesh import Mesh
from bireme.parallel.pipeline import StageSpec, partition, stage_specs

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": LLAMA,
        "mistral": LLAMA,
        "qwen2": LLAMA,
        "qwen3": QWEN3,
        "gemma2": GEMMA2,
        "phi3": PHI3,
        "gpt2": GPT2,
        "opt": OPT,
        "bloom": BLOOM,
        "gpt_neox": GPT_NEOX,
        "mixtral": MIXTRAL,
        "qwen3_moe": QWEN3_MOE,
    }
)  # by model type; `hf_config` says which architecture is of which


def family_of(config: ModelConfig) -> Family:
    return FAMILIES[config.model_type]


def build_stage(config: ModelConfig, mesh: Mesh, spec: StageSpec) -> StageModel:
    """One rank's part of the model, parameters empty, of the default dtype and device."""
    return StageModel(family_of(config), config, mesh, spec).eval()


def partition_layers(config: ModelConfig, parallel: ParallelConfig) -> tuple[StageSpec, ...]:
    """The stages: as given, or balanced by weight bytes a rank, embedding and head counted."""
    if parallel.layers_per_stage is not None:
        return stage_specs(parallel.layers_per_stage, config.num_layers)
    if parallel.pp_size == 1:
        return stage_specs((config.num_layers,), config.num_layers)
    whole = StageSpec(0, 0, config.num_layers, has_embedding=True, has_head=True)
    with torch.device("meta"):
        model = build_stage(config, Mesh((1,), 0), whole)

    def size(part: torch.nn.Module | None) -> int:
        return sum(parameter.numel() for parameter in part.parameters()) if part else 0

    last = size(model.head)
    if config.tie_word_embeddings and model.embedding is not None:
        last += model.embedding.tokens.weight.numel()  # type: ignore[union-attr,operator]
    costs = [size(layer) for layer in model.layers.values()]
    return stage_specs(
        partition(costs, parallel.widths, size(model.embedding), last), config.num_layers
    )


def rank_layout(config: ModelConfig, mesh: Mesh, spec: StageSpec) -> RankLayout:
    """What one rank holds, from its modules made without memory."""
    with torch.device("meta"):
        model = build_stage(config, mesh, spec)
    return RankLayout(
        rank=mesh.rank,
        stage=mesh.stage,
        tp_rank=mesh.tp_rank,
        layers=(spec.first_layer, spec.last_layer),
        params=tuple(layout for _, _, _, layout in named_layouts(model)),
        kv=tuple(
            module.kv_share for module in model.modules() if isinstance(module, PagedAttention)
        ),
    )


def end_names(config: ModelConfig) -> tuple[str, str]:
    """The names of the token embedding and of the head, were it not tied to it."""
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    ends = rank_layout(untied, Mesh((1,), 0), StageSpec(0, 0, 0, has_embedding=True, has_head=True))
    embedding, head = (
        param.pieces[0].source.name for param in ends.params if param.cut == "vocabulary"
    )
    return embedding, head


def model_layout(config: ModelConfig, parallel: ParallelConfig) -> ModelLayout:
    """The whole cut: ConfigError where a width or a number of stages cannot work."""
    for width in parallel.widths:
        if width > config.num_heads:
            raise ConfigError(
                f"tensor_parallel_size={width} exceeds the {config.num_heads} query heads; "
                f"use at most {config.num_heads}"
            )
    stages = partition_layers(config, parallel)
    meshes = [Mesh(parallel.widths, rank) for rank in range(parallel.world_size)]
    return ModelLayout(
        parallel.widths, tuple(rank_layout(config, mesh, stages[mesh.stage]) for mesh in meshes)
    )
