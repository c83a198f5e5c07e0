"""Small random checkpoints of every family, written by transformers in the Hub's file format.

Matrices are scaled so that logits spread and greedy output varies; norms, biases and softcaps are
random; prompts are longer than sliding windows and than the lengths that rope was scaled from.
Head counts are such that KV heads straddle ranks somewhere, and vocabularies need padding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

VOCAB = 300
PROMPT_LENGTHS = (41, 17, 30)
NUM_DECODE = 32
LONGEST = max(PROMPT_LENGTHS) + NUM_DECODE

_WINDOW = 12  # shorter than every prompt
_TRAINED_LENGTH = 24  # shorter than the long prompts, longer than the short one
_NO_SPECIAL_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


@dataclass(frozen=True)
class Case:
    """One model: its transformers config class and what it is called with."""

    config_class: str
    settings: Mapping[str, Any]
    seed: int = 0
    out_gain: float = 4.0  # of the matrices that add to the residual
    score_gain: float = 1.4  # of those that make queries and keys

    def config(self) -> Any:
        return getattr(transformers, self.config_class)(**{**_NO_SPECIAL_IDS, **self.settings})


def _rope(kind: str = "default", **more: Any) -> dict[str, Any]:
    """The base is small, so that every frequency turns within the short sequences of a test."""
    return {"rope_type": kind, "rope_theta": 500.0, **more}


def _shape(heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 8 * heads,
        "intermediate_size": 100,
        "num_hidden_layers": 4,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 96,
        "rms_norm_eps": 3e-3,
        "rope_parameters": _rope(),
        **more,
    }


_LLAMA3 = _rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=_TRAINED_LENGTH,
)
_YARN = _rope(
    "yarn",
    factor=4.0,
    beta_fast=3.0,
    beta_slow=0.25,
    truncate=False,
    original_max_position_embeddings=_TRAINED_LENGTH,
)
_LONGROPE = _rope(
    "longrope",
    factor=4.0,
    short_factor=[1.0, 1.1, 1.2],
    long_factor=[1.5, 2.5, 4.0],
    original_max_position_embeddings=_TRAINED_LENGTH,
    partial_rotary_factor=0.75,
)
_LLAMA = {
    "llama2": _shape(6, 6, num_hidden_layers=5),
    "llama3": _shape(8, 2, rope_parameters=_LLAMA3, tie_word_embeddings=True),
    "llama-biases": _shape(
        8, 4, head_dim=12, intermediate_size=96, attention_bias=True, mlp_bias=True
    ),
    "llama-linear": _shape(4, 2, rope_parameters=_rope("linear", factor=4.0)),
    "llama-yarn": _shape(4, 4, rope_parameters=_YARN),
    "llama-dynamic": _shape(
        4,
        2,
        rope_parameters=_rope("dynamic", factor=4.0),
        max_position_embeddings=_TRAINED_LENGTH,
    ),
}
_QWEN2 = _shape(6, 2, use_sliding_window=True, sliding_window=_WINDOW, max_window_layers=2)
_QWEN3_MOE = _shape(
    4,
    2,
    num_hidden_layers=6,
    head_dim=12,
    moe_intermediate_size=40,
    num_experts=6,
    num_experts_per_tok=3,
    norm_topk_prob=True,
    decoder_sparse_step=2,
    mlp_only_layers=[3],
)
_MIXTRAL = _shape(
    6,
    2,
    intermediate_size=96,
    sliding_window=_WINDOW,
    num_local_experts=5,
    num_experts_per_tok=2,
)
_GEMMA2 = _shape(
    4,
    2,
    head_dim=12,
    sliding_window=_WINDOW,
    query_pre_attn_scalar=7,
    attn_logit_softcapping=2.7,
    final_logit_softcapping=4.1,
)
_PHI3_LONG = _shape(
    4, 4, rope_parameters=_LONGROPE, original_max_position_embeddings=_TRAINED_LENGTH
)
_NEOX = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "layer_norm_eps": 3e-3,
    "hidden_act": "gelu",
    "rope_parameters": _rope(partial_rotary_factor=0.375),
}
_OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "ffn_dim": 100,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 96,
}
_OPT_350M = {**_OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False}
_OPT_PLAIN = {**_OPT, "enable_bias": False, "layer_norm_elementwise_affine": False}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 60,
    "n_layer": 4,
    "n_head": 5,
    "n_positions": 96,
    "layer_norm_epsilon": 3e-3,
}
_GPT2_SCALED = {**_GPT2, "scale_attn_by_inverse_layer_idx": True, "n_inner": 72}
_BLOOM = {
    "vocab_size": VOCAB,
    "hidden_size": 60,
    "n_layer": 4,
    "n_head": 6,
    "layer_norm_epsilon": 3e-3,
}
_BLOOM_RESIDUAL = {**_BLOOM, "apply_residual_connection_post_layernorm": True}

CASES: dict[str, Case] = {name: Case("LlamaConfig", fields) for name, fields in _LLAMA.items()} | {
    "mistral": Case("MistralConfig", _shape(6, 3, sliding_window=_WINDOW)),
    "qwen2": Case("Qwen2Config", _QWEN2),
    "qwen3": Case("Qwen3Config", _shape(8, 4, head_dim=24, intermediate_size=96)),
    "gemma2": Case("Gemma2Config", _GEMMA2, seed=1),
    "phi3": Case("Phi3Config", _shape(6, 2, sliding_window=_WINDOW)),
    "phi3-longrope": Case("Phi3Config", _PHI3_LONG),
    "gpt2": Case("GPT2Config", _GPT2),
    "gpt2-scaled": Case("GPT2Config", _GPT2_SCALED),
    "opt": Case("OPTConfig", _OPT),
    "opt-350m": Case("OPTConfig", _OPT_350M, seed=14, out_gain=1.0, score_gain=2.0),
    "opt-plain": Case("OPTConfig", _OPT_PLAIN),
    "bloom": Case("BloomConfig", _BLOOM, score_gain=2.0),
    "bloom-residual": Case("BloomConfig", _BLOOM_RESIDUAL, seed=2, out_gain=1.5),
    "gpt-neox": Case("GPTNeoXConfig", _NEOX, seed=1),
    "gpt-neox-serial": Case(
        "GPTNeoXConfig", {**_NEOX, "use_parallel_residual": False, "attention_bias": False}
    ),
    "mixtral": Case("MixtralConfig", _MIXTRAL),
    "qwen3-moe": Case("Qwen3MoeConfig", _QWEN3_MOE),
}


_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "down_proj", "fc2")
_SCORES = ("q_proj", "k_proj", "query_key_value", "c_attn")


def _gain(name: str, is_table: bool, case: Case) -> float:
    """Standard deviation of what a matrix makes of unit inputs. Layers add more to the residual
    than the embedding does, so that tied models do not repeat the last token."""
    if "wpe" in name or "positions" in name:
        return 12.0
    if is_table:
        return 2.0
    if name.endswith(_SCORES):
        return case.score_gain
    return case.out_gain if name.endswith(_OUTPUTS) else 1.4


def _randomise(model: nn.Module, case: Case) -> None:
    """Fills every parameter; nothing keeps its default."""
    generator = torch.Generator().manual_seed(case.seed)
    is_gemma = "Gemma" in type(model).__name__  # its norms hold weight - 1
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            fan_in = parameter.shape[-2 if _is_conv1d(model, name) else -1]
            value = (
                noise
                * _gain(
                    name.removesuffix(".weight"),
                    parameter.shape[0] == model.config.vocab_size,
                    case,
                )
                / fan_in**0.5
            )
        elif name.endswith("bias"):
            value = 0.1 * noise
        elif is_gemma:
            value = 0.3 * noise + (3 if "post_" in name else 0)
        else:
            value = 0.3 * noise + 1
        parameter.data.copy_(value)


def _is_conv1d(model: nn.Module, name: str) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    return type(owner).__name__ == "Conv1D"


def hf_config(case: Case) -> dict[str, Any]:
    """The case's config.json, every field written out."""
    head = "LMHeadModel" if case.config_class == "GPT2Config" else "ForCausalLM"
    fields: dict[str, Any] = json.loads(case.config().to_json_string(use_diff=False))
    return {**fields, "architectures": [case.config_class.replace("Config", head)]}


def make_model(case: Case) -> Any:
    """The case's random transformers model, in float32."""
    model = transformers.AutoModelForCausalLM.from_config(
        case.config(), attn_implementation="eager"
    )
    _randomise(model, case)
    return model.eval()


def write(case: Case, folder: Path) -> Path:
    """Saves the model of `case` under `folder`."""
    make_model(case).save_pretrained(folder)
    return folder


def prompts(vocab: int = VOCAB, lengths: tuple[int, ...] = PROMPT_LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]
