"""Which fields of a config.json each model type reads, what one means that is left out, and what
values each can have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bireme.errors import ConfigError
from bireme.hf_config.readers import (
    Reader,
    flag,
    list_of,
    number,
    one_of,
    optional,
    read,
    text,
    whole,
)

MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Phi3ForCausalLM": "phi3",
    "GPT2LMHeadModel": "gpt2",
    "OPTForCausalLM": "opt",
    "BloomForCausalLM": "bloom",
    "GPTNeoXForCausalLM": "gpt_neox",
    "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}

_LLAMA: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "original_max_position_embeddings": None,
}
_QWEN: dict[str, Any] = {
    **_LLAMA,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
}
_QWEN_DENSE: dict[str, Any] = {
    **_QWEN,
    "num_key_value_heads": 32,
    "max_window_layers": 28,
    "layer_types": None,
}
# The fields, beside sizes and rope scaling, that each model type reads; and what one means that its
# config.json leaves out, as transformers has it. No other field is read: it would mean nothing.
_OPTIONAL: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, "attention_bias": False, "mlp_bias": False},
    "mistral": {
        **_LLAMA,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN_DENSE,
    "qwen3": {**_QWEN_DENSE, "head_dim": 128, "attention_bias": False},
    "gemma2": {
        **{name: value for name, value in _LLAMA.items() if name != "hidden_act"},
        "hidden_activation": "gelu_pytorch_tanh",
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "layer_types": None,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "use_bidirectional_attention": None,
    },
    "phi3": {
        **_LLAMA,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "sliding_window": None,
    },
    "gpt2": {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "n_positions": 1024,
        "n_inner": None,
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    },
    "opt": {
        "activation_function": "relu",
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "word_embed_proj_dim": None,
    },
    "bloom": {
        "layer_norm_epsilon": 1e-5,
        "seq_length": 2048,
        "tie_word_embeddings": True,
        "apply_residual_connection_post_layernorm": False,
    },
    "gpt_neox": {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "use_parallel_residual": True,
        "rotary_emb_base": 10000.0,
        "rotary_pct": 0.25,
    },
    "mixtral": {
        **_LLAMA,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": None,
        "rope_theta": 1000000.0,
    },
    "qwen3_moe": {
        **_QWEN,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": (),
        "norm_topk_prob": False,
    },
}
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_WIDEST, _MOST_LAYERS, _MOST_HEADS, _MOST_EXPERTS = 10**7, 10_000, 65_536, 4096
_LAYER_KINDS = ("full_attention", "sliding_attention")

_READERS: dict[str, Reader[Any]] = {
    "activation_function": one_of(ACTIVATIONS),
    "apply_residual_connection_post_layernorm": flag,
    "attention_bias": flag,
    "attn_logit_softcapping": optional(number(1e-6)),
    "decoder_sparse_step": whole(),
    "do_layer_norm_before": flag,
    "enable_bias": flag,
    "final_logit_softcapping": optional(number(1e-6)),
    "head_dim": optional(whole(most=65_536)),
    "hidden_act": one_of(ACTIVATIONS),
    "hidden_activation": one_of(ACTIVATIONS),
    "hidden_size": whole(most=_WIDEST),
    "intermediate_size": whole(most=_WIDEST),
    "layer_norm_elementwise_affine": flag,
    "layer_norm_eps": number(0, 1),
    "layer_norm_epsilon": number(0, 1),
    "layer_types": optional(list_of(one_of(_LAYER_KINDS))),
    "max_position_embeddings": whole(),
    "max_window_layers": whole(0),
    "mlp_bias": flag,
    "mlp_only_layers": optional(list_of(whole(0))),
    "moe_intermediate_size": whole(most=_WIDEST),
    "n_inner": optional(whole(most=_WIDEST)),
    "n_positions": whole(),
    "norm_topk_prob": flag,
    "num_attention_heads": whole(most=_MOST_HEADS),
    "num_experts_per_tok": whole(most=_MOST_EXPERTS),
    "num_hidden_layers": whole(most=_MOST_LAYERS),
    "num_key_value_heads": optional(whole(most=_MOST_HEADS)),
    "num_local_experts": whole(most=_MOST_EXPERTS),
    "original_max_position_embeddings": optional(whole(2)),
    "partial_rotary_factor": number(0, 1),
    "query_pre_attn_scalar": number(1e-6),
    "_remove_final_layer_norm": flag,
    "rms_norm_eps": number(0, 1),
    "rope_theta": number(1.01, 1e30),
    "rotary_emb_base": number(1.01, 1e30),
    "rotary_pct": number(0, 1),
    "scale_attn_by_inverse_layer_idx": flag,
    "scale_attn_weights": flag,
    "seq_length": whole(),
    "sliding_window": optional(whole()),
    "tie_word_embeddings": flag,
    "use_bidirectional_attention": optional(flag),
    "use_parallel_residual": flag,
    "use_sliding_window": flag,
    "vocab_size": whole(),
    "word_embed_proj_dim": optional(whole(most=_WIDEST)),
}


def model_type(hf: Mapping[str, Any]) -> str:
    """By the architecture, which also chooses the family."""
    architectures = hf.get("architectures") or []
    if not architectures:
        raise ConfigError("config.json names no architecture; `architectures` is needed")
    architecture = read("architectures", architectures, list_of(text))[0]
    if architecture not in MODEL_TYPES:
        raise ConfigError(
            f"architecture {architecture} is not supported; supported are {', '.join(MODEL_TYPES)}"
        )
    return MODEL_TYPES[architecture]


def optional_fields(hf: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Every field that `kind` reads and may be left out; ConfigError names a value that is none."""
    return {
        name: read(name, hf.get(name, default), _READERS[name])
        for name, default in _OPTIONAL[kind].items()
    }


def needed_field(hf: Mapping[str, Any], *names: str) -> Any:
    """The field `names[0]`, which may be spelled like any of `names`."""
    found = next((name for name in names if hf.get(name) is not None), None)
    if found is None:
        wanted, kind = " or ".join(names), hf.get("model_type")
        raise ConfigError(f"config.json has no {wanted}; it is needed for a {kind} model")
    return read(found, hf[found], _READERS[names[0]])
