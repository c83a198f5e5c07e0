"""Checkpoints as they were written over the years load, and mean the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from harness import Checkpoints, engine_config
from safetensors.torch import load_file, save_file

from bireme.checkpoint.prepared import prepare_model
from bireme.errors import CheckpointError, ConfigError
from bireme.hf_config import MODEL_TYPES, from_hf
from bireme.models.registry import FAMILIES
from bireme.verify import transformers_reference, verify

Tensors = dict[str, torch.Tensor]

SIZES = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "n_embd", "n_layer", "n_head", "ffn_dim", "num_local_experts",
    "num_experts_per_tok", "moe_intermediate_size",
}  # fmt: skip


def _old(case: str, drop: tuple[str, ...] = ("rope_parameters",), **fields: Any) -> dict[str, Any]:
    return {
        key: value for key, value in zoo.hf_config(zoo.CASES[case]).items() if key not in drop
    } | fields


def _old_rope(case: str, **scaling: Any) -> dict[str, Any]:
    return _old(case, rope_theta=500.0, rope_scaling=scaling or None)


OLD_CONFIGS = {
    "llama2": _old_rope("llama2"),
    "llama3": _old_rope(
        "llama3",
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=24,
    ),
    "llama-linear": _old_rope("llama-linear", type="linear", factor=4.0),
    "llama-dynamic": _old_rope("llama-dynamic", type="dynamic", factor=4.0),
    "llama-yarn": _old_rope(
        "llama-yarn",
        type="yarn",
        factor=4.0,
        beta_fast=3.0,
        beta_slow=0.25,
        truncate=False,
        original_max_position_embeddings=24,
    ),
    "phi3-longrope": _old_rope(
        "phi3-longrope", type="su", short_factor=[1.0, 1.1, 1.2], long_factor=[1.5, 2.5, 4.0]
    )
    | {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 24},
    "gpt-neox": _old("gpt-neox", rotary_emb_base=500.0, rotary_pct=0.375),
    "bloom": _old("bloom", ("hidden_size", "n_head"), n_embed=60, num_attention_heads=6),
    "qwen3-moe": _old("qwen3-moe", ("num_local_experts",), num_experts=6),
}


@pytest.mark.parametrize("case", OLD_CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_an_old_spelling_of_a_config_means_the_same_as_todays(case: str) -> None:
    old = {**OLD_CONFIGS[case], "torch_dtype": "float32"}
    old.pop("dtype", None)
    assert from_hf(old) == from_hf(zoo.hf_config(zoo.CASES[case]))


@pytest.mark.parametrize("case", zoo.CASES)
@pytest.mark.filterwarnings("ignore")
def test_a_field_left_out_means_what_transformers_takes_it_to_mean(case: str) -> None:
    """Or it is a size, and its absence an error."""
    whole = zoo.hf_config(zoo.CASES[case])
    config_class = getattr(transformers, zoo.CASES[case].config_class)
    for name in whole.keys() - {"architectures", "model_type", *SIZES}:
        cut = {key: value for key, value in whole.items() if key != name}
        filled = config_class.from_dict(json.loads(json.dumps(cut))).to_dict()
        assert from_hf(cut) == from_hf(filled | {"architectures": whole["architectures"]}), name
    for name in SIZES & whole.keys() - {"num_key_value_heads"}:
        with pytest.raises(ConfigError, match=r"config\.json has no"):
            from_hf({key: value for key, value in whole.items() if key != name})


def test_every_architecture_has_a_family() -> None:
    assert set(MODEL_TYPES.values()) == set(FAMILIES)


def test_an_unsupported_architecture_is_refused_by_name_with_the_list() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^architecture FalconForCausalLM is not supported; supported are Llama.*Mixtral",
    ) as caught:
        from_hf({"architectures": ["FalconForCausalLM"], "model_type": "falcon", "hidden_size": 64})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}},
            "rope_scaling.rope_type 'spiral'; one of default, linear",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope scaling 'linear' no factor"),
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'; one of silu"),
        ({"num_key_value_heads": 4}, "6 query heads are not a multiple of 4 KV heads"),
        ({"vocab_size": None}, "no vocab_size"),
        ({"architectures": None}, "names no architecture"),
    ],
)
def test_what_a_config_asks_for_and_nobody_has_is_refused_in_one_line(
    fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        from_hf(_old("llama2", **fields))
    assert "\n" not in str(caught.value)


def _rewritten(
    checkpoints: Checkpoints, case: str, folder: Path, change: Callable[[Tensors], Tensors]
) -> Path:
    """A copy of the case's checkpoint with other tensors in it."""
    source = checkpoints.model(case).folder
    shutil.copytree(source, folder)
    tensors = change(load_file(source / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        assert any(name.startswith(old) for name in tensors)
        return {
            new + name.removeprefix(old) if name.startswith(old) else name: tensor
            for name, tensor in tensors.items()
        }

    return change


def _with(*names: str) -> Callable[[Tensors], Tensors]:
    """Tensors that nobody needs beside the others."""
    return lambda tensors: tensors | {name: torch.zeros(1, 1, 4, 4) for name in names}


def _with_head(embedding: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {"lm_head.weight": tensors[embedding].clone()}


def _with_another_head(
    embedding: str, head: str = "lm_head.weight"
) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {head: tensors[embedding].flip(0).contiguous()}


_ROPE_BUFFERS = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(5)]
_NEOX_BUFFERS = [
    f"gpt_neox.layers.0.attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq")
]
OLD_FILES = {
    "gpt2-without-prefix": ("gpt2", _renamed("transformer.", "")),
    "bloom-without-prefix": ("bloom", _renamed("transformer.", "")),
    "opt-old-prefix": ("opt", _renamed("model.decoder.", "decoder.")),
    "llama-rope-buffers": ("llama2", _with(*_ROPE_BUFFERS)),
    "gpt2-masks": ("gpt2", _with("transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias")),
    "gpt-neox-buffers": ("gpt-neox", _with(*_NEOX_BUFFERS)),
    "llama-tied-head": ("llama3", _with_head("model.embed_tokens.weight")),
    "gpt2-tied-head": ("gpt2", _with_head("transformer.wte.weight")),
    "opt-tied-head": ("opt", _with_head("model.decoder.embed_tokens.weight")),
    "bloom-tied-head": ("bloom", _with_head("transformer.word_embeddings.weight")),
    "llama-head-alone": ("llama3", _renamed("model.embed_tokens.weight", "lm_head.weight")),
    "gpt2-head-alone": ("gpt2", _renamed("transformer.wte.weight", "lm_head.weight")),
    "bloom-head-alone": ("bloom", _renamed("transformer.word_embeddings.weight", "lm_head.weight")),
}
ANOTHER_HEAD = {
    "llama3": _with_another_head("model.embed_tokens.weight"),
    "gemma2": _with_another_head("model.embed_tokens.weight"),
    "gpt2": _with_another_head("transformer.wte.weight"),
    "opt-350m": _with_another_head("model.decoder.embed_tokens.weight"),
    "bloom": _with_another_head("transformer.word_embeddings.weight"),
}


@pytest.mark.usefixtures("local_ranks")
@pytest.mark.parametrize(("case", "change"), OLD_FILES.values(), ids=OLD_FILES)
def test_an_old_file_is_the_same_model(
    checkpoints: Checkpoints, tmp_path: Path, case: str, change: Callable[[Tensors], Tensors]
) -> None:
    model = prepare_model(str(_rewritten(checkpoints, case, tmp_path / "old", change)))
    reference = checkpoints.reference(case, num_decode=2)
    found = verify(model, engine_config(2, 1), zoo.prompts(), reference=reference)
    assert found.is_same, found


@pytest.mark.usefixtures("local_ranks")
@pytest.mark.parametrize("case", ANOTHER_HEAD)
def test_a_tied_config_with_another_head_in_the_file_means_that_head(
    checkpoints: Checkpoints, tmp_path: Path, case: str
) -> None:
    folder = _rewritten(checkpoints, case, tmp_path / "other", ANOTHER_HEAD[case])
    model = prepare_model(str(folder))
    reference = transformers_reference(model, zoo.prompts(), 2, "float32")
    found = verify(model, engine_config(2, 1), zoo.prompts(), reference=reference)
    assert found.is_same, found
    unheeded = verify(
        model, engine_config(2, 1), zoo.prompts(), reference=checkpoints.reference(case, 2)
    )
    assert not unheeded.is_same, "the other head makes no difference"


def test_a_buffer_of_another_family_is_no_excuse(checkpoints: Checkpoints, tmp_path: Path) -> None:
    change = _with("model.layers.0.self_attn.masked_bias")
    model = prepare_model(str(_rewritten(checkpoints, "llama2", tmp_path / "odd", change)))
    with pytest.raises(CheckpointError, match="masked_bias, which the model does not know"):
        verify(model, engine_config(), zoo.prompts(), reference="uncut")
