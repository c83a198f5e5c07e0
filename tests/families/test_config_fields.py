"""Every config field that a family reads matters: with another value parity fails.

The fields are recorded while a model is built and run, so that a newly read one without another
value here fails the test. Where another value asks for other tensors, the files are made to hold
them, so that the model runs and is seen to compute something else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from harness import Checkpoints, engine_config
from local_world import LocalExecutor
from safetensors.torch import load_file, save_file

from bireme.checkpoint.names import name_map
from bireme.checkpoint.opener import open_folder
from bireme.checkpoint.prepared import PreparedModel
from bireme.config import ParallelConfig
from bireme.engine.executor import WorkerPlan
from bireme.engine.prepare import make_plan
from bireme.errors import CheckpointError
from bireme.model_config import ModelConfig, MoeConfig, RopeConfig
from bireme.models.registry import family_of, model_layout
from bireme.verify import TOLERANCES, Reference, lead, transformers_reference

Change = Callable[[ModelConfig], ModelConfig]
_LENGTHS = (49, 20)  # one beyond the lengths that rope was scaled from, one within


def _set(field: str, *values: Any) -> Change:
    """The first of `values` that the field does not have."""

    def change(config: ModelConfig) -> ModelConfig:
        value = next(value for value in values if value != getattr(config, field))
        return dataclasses.replace(config, **{field: value})

    return change


def _map(field: str, function: Callable[[Any], Any]) -> Change:
    return lambda config: dataclasses.replace(config, **{field: function(getattr(config, field))})


def _inside(part: str, change: Callable[[Any], Any]) -> Change:
    """Changes config.rope or config.moe."""
    return lambda config: dataclasses.replace(config, **{part: change(getattr(config, part))})


def _flip(field: str) -> Change:
    return _map(field, lambda value: not value)


def _doubled(field: str) -> Change:
    return _map(field, lambda value: 2 * value)


def _other_rope(rope: RopeConfig | None) -> RopeConfig | None:
    return None if rope else RopeConfig(theta=500.0, rotary_dim=4, original_max_len=96)


def _other_kind(rope: RopeConfig) -> RopeConfig:
    if rope.kind == "default":
        return dataclasses.replace(rope, kind="linear", factor=4.0)
    return dataclasses.replace(rope, kind="default")


# Sizes: the tensors in the files have others, so that a wrong one is refused before anything runs.
SIZES: dict[str, Change] = {
    "vocab_size": _doubled("vocab_size"),
    "hidden_size": _doubled("hidden_size"),
    "num_layers": _map("num_layers", lambda layers: layers - 1),
    "num_heads": _doubled("num_heads"),
    "num_kv_heads": _set("num_kv_heads", 1),
    "head_dim": _doubled("head_dim"),
    "intermediate_size": _doubled("intermediate_size"),
    "max_position_embeddings": _doubled("max_position_embeddings"),
    "embedding_dim": _doubled("embedding_dim"),
    "moe.num_experts": _inside("moe", _doubled("num_experts")),  # type: ignore[arg-type]
    "moe.intermediate_size": _inside("moe", _doubled("intermediate_size")),  # type: ignore[arg-type]
}
# Refused too: another family's tensors have other names.
FAMILY: dict[str, Change] = {"model_type": _set("model_type", "bloom", "gpt2")}
REFUSED = SIZES | FAMILY
# Neutral where the family uses the field, active where it does not.
OTHERS: dict[str, Change] = {
    "activation": _set("activation", "relu", "gelu"),
    "norm_eps": _set("norm_eps", 0.1),
    "tie_word_embeddings": _flip("tie_word_embeddings"),
    "windows": _map("windows", lambda windows: (None if any(windows) else 8,) * len(windows)),
    "attention_scale": _set("attention_scale", 1.0),
    "rope": _map("rope", _other_rope),
    "has_qkv_bias": _flip("has_qkv_bias"),
    "has_out_bias": _flip("has_out_bias"),
    "has_mlp_bias": _flip("has_mlp_bias"),
    "has_norm_params": _flip("has_norm_params"),
    "attention_softcap": _set("attention_softcap", None, 2.0),
    "final_softcap": _set("final_softcap", None, 2.0),
    "position_offset": _set("position_offset", 0, 2),
    "is_norm_first": _flip("is_norm_first"),
    "has_final_norm": _flip("has_final_norm"),
    "has_parallel_residual": _flip("has_parallel_residual"),
    "has_residual_after_norm": _flip("has_residual_after_norm"),
    "has_scale_by_layer": _flip("has_scale_by_layer"),
    "rope.kind": _inside("rope", _other_kind),
    "moe.norm_topk_prob": _inside("moe", _flip("norm_topk_prob")),  # type: ignore[arg-type]
    "moe.num_experts_per_tok": _inside("moe", _set("num_experts_per_tok", 1)),  # type: ignore[arg-type]
    "moe.is_sparse": _inside("moe", _map("is_sparse", lambda flags: tuple(not f for f in flags))),  # type: ignore[arg-type]
} | {
    f"rope.{field}": _inside("rope", change)  # type: ignore[arg-type]
    for field, change in {
        "theta": _set("theta", 10000.0),
        "rotary_dim": _map("rotary_dim", lambda dim: dim // 4 * 2),
        "factor": _set("factor", 1.0),
        "original_max_len": _set("original_max_len", 96),
        "attention_factor": _set("attention_factor", 1.0, 1.2),
        "low_freq_factor": _set("low_freq_factor", 0.5),
        "high_freq_factor": _set("high_freq_factor", 8.0),
        "beta_fast": _set("beta_fast", 32.0),
        "beta_slow": _set("beta_slow", 1.0),
        "truncate": _flip("truncate"),
        "short_factor": _map("short_factor", lambda factors: (1.0,) * len(factors)),
        "long_factor": _map("long_factor", lambda factors: (1.0,) * len(factors)),
    }.items()
}
CONTAINERS = {"moe"}  # each of its fields is changed by itself


def _recording(value: Any, prefix: str, reads: set[str]) -> Any:
    """The same dataclass value, which notes the fields that are asked for."""
    names = {field.name for field in dataclasses.fields(value)}
    nested = {name: getattr(value, name) for name in names}
    for name, part in nested.items():
        if dataclasses.is_dataclass(part):
            nested[name] = _recording(part, f"{prefix}{name}.", reads)

    def get(self: Any, name: str) -> Any:
        if name in names:
            reads.add(prefix + name)
            return nested[name]
        return object.__getattribute__(self, name)

    recorder = type(type(value).__name__, (type(value),), {"__getattribute__": get})
    return object.__new__(recorder)


def _with_tensors_for(model: PreparedModel, config: ModelConfig, folder: Path) -> PreparedModel:
    """The model with another config, whose files hold what that asks for: the same tensors, less
    those that it does not know, and noise for those (or those rows) that are not there."""
    source, sources = open_folder(model.folder), model_layout(config, ParallelConfig()).sources
    names = name_map(sources, source.tensors, family_of(config).prefixes)
    tensors = load_file(model.folder / "model.safetensors")
    generator, wanted = torch.Generator().manual_seed(3), {}
    for name, asked in sources.items():
        shape = asked.view.file_shape(asked.shape)
        tensor = 0.3 * torch.randn(shape, generator=generator)
        if (kept := tensors.get(names.in_file(name))) is not None:
            both = tuple(slice(min(sizes)) for sizes in zip(shape, kept.shape, strict=True))
            tensor[both] = kept[both]
        wanted[names.in_file(name)] = tensor
    folder.mkdir()
    save_file(wanted, folder / "model.safetensors")
    return dataclasses.replace(model, config=config, folder=folder)


def _difference(reference: Reference, found: list[torch.Tensor]) -> float:
    """The largest of logits, in standard deviations of the reference's."""
    off = max(float((a - b).abs().max()) for a, b in zip(reference.logits, found, strict=True))
    return off / float(torch.cat(reference.logits).std())


def _run(plan: WorkerPlan, reference: Reference, folder: Path) -> float:
    folder.mkdir()
    executor = LocalExecutor(plan)
    try:
        found = lead(executor, plan, reference.sequences, folder, probes=False)  # type: ignore[arg-type]
    finally:
        executor.close()
    return _difference(reference, found)


def _run_whole(
    model: PreparedModel, reference: Reference, folder: Path
) -> tuple[float, WorkerPlan, set[str]]:
    """How far the model is off as it is, its plan, and the fields that are read meanwhile."""
    plan, reads = make_plan(model, engine_config()), set[str]()
    recording = dataclasses.replace(plan, model=_recording(model.config, "", reads))
    return _run(recording, reference, folder), plan, reads - CONTAINERS


@pytest.mark.parametrize("case", zoo.CASES)
def test_with_another_value_in_any_field_that_is_read_parity_fails(
    checkpoints: Checkpoints, tmp_path: Path, case: str
) -> None:
    model = checkpoints.model(case)
    reference = transformers_reference(model, zoo.prompts(lengths=_LENGTHS), 0, "float32")
    tolerance = TOLERANCES["float32"].largest
    off, whole, reads = _run_whole(model, reference, tmp_path / "whole")
    assert off < tolerance
    assert reads <= REFUSED.keys() | OTHERS.keys(), "a field is read that no test changes"
    for field in sorted(reads & REFUSED.keys()):
        config = REFUSED[field](model.config)
        assert config != model.config
        with pytest.raises(CheckpointError):
            make_plan(dataclasses.replace(model, config=config), engine_config())
    for field in sorted(reads & OTHERS.keys()):
        config = OTHERS[field](model.config)
        assert config != model.config
        changed = _with_tensors_for(model, config, tmp_path / f"{field}-files")
        changed_plan = make_plan(changed, engine_config())
        plan = dataclasses.replace(  # as long a context, whatever the field says of it
            changed_plan,
            budget=dataclasses.replace(
                changed_plan.budget,
                kinds=tuple(
                    dataclasses.replace(kind, num_blocks=whole.kinds[0].num_blocks)
                    for kind in changed_plan.kinds
                ),
            ),
            max_model_len=whole.max_model_len,
        )
        off = _run(plan, reference, tmp_path / field)
        assert not off < 3 * tolerance, f"{field} makes no difference ({off:.1e})"


def test_every_field_is_read_by_some_family_or_describes_the_model_to_others(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    reads: set[str] = set()
    for case in zoo.CASES:
        model = checkpoints.model(case)
        reference = transformers_reference(model, zoo.prompts(lengths=(5,)), 0, "float32")
        reads |= _run_whole(model, reference, tmp_path / case)[2]
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    fields |= {f"rope.{field.name}" for field in dataclasses.fields(RopeConfig)}
    fields |= {f"moe.{field.name}" for field in dataclasses.fields(MoeConfig)}
    described = {"architecture", "dtype"}
    assert fields - reads - CONTAINERS == described
