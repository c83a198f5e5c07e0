"""Which families there are, and how a model is cut into stages and ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import reduce
from itertools import accumulate, pairwise
from math import inf
from types import MappingProxyType

import torch

from bireme.config import ParallelConfig
from bireme.errors import ConfigError
from bireme.model_config import ModelConfig
from bireme.models.attention import Attention, PagedAttention
from bireme.models.blocks import MLP, Family, MoE, StageModel
from bireme.models.bloom import BLOOM
from bireme.models.gemma2 import GEMMA2
from bireme.models.gpt2 import GPT2
from bireme.models.gpt_neox import GPT_NEOX
from bireme.models.llama import LLAMA, QWEN3
from bireme.models.moe import MIXTRAL, QWEN3_MOE
from bireme.models.opt import OPT
from bireme.models.phi3 import PHI3
from bireme.parallel.layers import named_layouts
from bireme.parallel.layout import ModelLayout, RankLayout, StepWork
from bireme.parallel.mesh import Mesh
from bireme.parallel.pipeline import StageSpec, partition_by, stage_specs

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
    """The stages: as given, or balanced by the weights that a step reads on a rank, of the embedding a row a
    token, as far as no rank holds over a tenth more weights than the fullest must."""
    if parallel.layers_per_stage is not None:
        return stage_specs(parallel.layers_per_stage, config.num_layers)
    if parallel.pp_size == 1:
        return stage_specs((config.num_layers,), config.num_layers)
    layers, embedding, head = _weight_elements(config)
    num_layers, widths = config.num_layers, parallel.widths
    total = [0, *accumulate(layers)]

    def read(stage: int, start: int, stop: int) -> float:
        return (total[stop] - total[start] + head * (stop == num_layers)) / widths[stage]

    def held(stage: int, start: int, stop: int) -> float:
        return read(stage, start, stop) + embedding * (start == 0) / widths[stage]

    counts = partition_by(held, num_layers, len(widths))
    edges = pairwise(accumulate(counts, initial=0))
    most = 1.1 * max(held(stage, *edge) for stage, edge in enumerate(edges))

    def cost(stage: int, start: int, stop: int) -> float:
        return read(stage, start, stop) if held(stage, start, stop) <= most else inf

    return stage_specs(partition_by(cost, num_layers, len(widths)), num_layers)


def _weight_elements(config: ModelConfig) -> tuple[list[int], int, int]:
    """Of every layer, of the embedding, and of the head. Layers that route alike are equal."""
    is_sparse = config.moe.is_sparse if config.moe else (False,) * config.num_layers

    def part(first: int, last: int, *, is_whole: bool) -> StageModel:
        with torch.device("meta"):
            spec = StageSpec(0, first, last, has_embedding=is_whole, has_head=is_whole)
            return build_stage(config, Mesh((1,), 0), spec)

    def size(module: torch.nn.Module | None) -> int:
        return sum(parameter.numel() for parameter in module.parameters()) if module else 0

    ends = part(0, 0, is_whole=True)
    last = size(ends.head)
    if config.tie_word_embeddings and ends.embedding is not None:
        last += ends.embedding.tokens.weight.numel()  # type: ignore[union-attr,operator]
    samples = {kind: is_sparse.index(kind) for kind in set(is_sparse)}
    sizes = {kind: size(part(layer, layer + 1, is_whole=False)) for kind, layer in samples.items()}
    return [sizes[kind] for kind in is_sparse], size(ends.embedding), last


def rank_layout(config: ModelConfig, mesh: Mesh, spec: StageSpec) -> RankLayout:
    """What one rank holds, from its modules made without memory."""
    with torch.device("meta"):
        model = build_stage(config, mesh, spec)
    works = [
        module.work
        for module in model.modules()
        if isinstance(module, PagedAttention | Attention | MLP | MoE)
    ]
    return RankLayout(
        rank=mesh.rank,
        stage=mesh.stage,
        tp_rank=mesh.tp_rank,
        layers=(spec.first_layer, spec.last_layer),
        params=tuple(layout for _, _, _, layout in named_layouts(model)),
        kv=tuple(
            module.kv_spec for module in model.modules() if isinstance(module, PagedAttention)
        ),
        work=reduce(StepWork.largest, works, StepWork()),
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
    return ModelLayout(parallel.widths, tuple(rank_layouts(config, parallel)))


def rank_layouts(config: ModelConfig, parallel: ParallelConfig) -> Iterator[RankLayout]:
    """The ranks of `model_layout`, each made when it is asked for."""
    for width in parallel.widths:
        if width > config.num_heads:
            raise ConfigError(
                f"tensor_parallel_size={width} exceeds the {config.num_heads} query heads; "
                f"use at most {config.num_heads}"
            )
    stages = partition_layers(config, parallel)
    for rank in range(parallel.world_size):
        mesh = Mesh(parallel.widths, rank)
        yield rank_layout(config, mesh, stages[mesh.stage])
