"""Reads a Hugging Face config.json.

`from_hf` is the one place that meets that file's aliases, defaults and old spellings
(`rope_scaling`, `torch_dtype`, `n_embd`...). Everything behind it reads `ModelConfig`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bireme.errors import CheckpointError, ConfigError
from bireme.model_config import ModelConfig, MoeConfig, RopeConfig

_MODEL_TYPES = {
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
ARCHITECTURES = tuple(_MODEL_TYPES)

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
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_LARGEST_SIZE, _MOST_LAYERS, _MOST_HEADS = 10**8, 10_000, 65_536
_ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; CheckpointError names the file if it holds no such thing."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; it is no model folder") from None
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; an object is needed")
    return value


def _first(hf: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    """The first of `names` that is present and not null."""
    return next((hf[name] for name in names if hf.get(name) is not None), default)


def _need(hf: Mapping[str, Any], *names: str) -> Any:
    value = _first(hf, *names)
    if value is None:
        wanted, kind = " or ".join(names), hf.get("model_type")
        raise ConfigError(f"config.json has no {wanted}; it is needed for a {kind} model")
    return value


def _size(name: str, value: Any, most: int = _LARGEST_SIZE) -> int:
    """A whole number from 1 to `most`."""
    if type(value) is not int or not 1 <= value <= most:
        raise ConfigError(
            f"config.json gives {name} {value!r}; a whole number from 1 to {most} is needed"
        )
    return value


def _rope(
    hf: Mapping[str, Any], read: Mapping[str, Any], head_dim: int, max_len: int
) -> RopeConfig:
    """From `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before it)."""
    given = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    kind = _first(given, "rope_type", "type", default="default")
    kind = {"su": "longrope", "ntk": "dynamic"}.get(kind, kind)
    if kind not in _ROPE_KINDS:
        raise ConfigError(
            f"rope scaling {kind!r} is not supported; supported are {', '.join(_ROPE_KINDS)}"
        )
    share = _first(
        given, "partial_rotary_factor", default=_first(read, "partial_rotary_factor", "rotary_pct")
    )
    original = int(
        _first(read, "original_max_position_embeddings")
        or _first(given, "original_max_position_embeddings", default=max_len)
    )
    factor = _first(given, "factor")
    if factor is None:
        if kind in ("linear", "dynamic", "llama3"):
            raise ConfigError(f"config.json gives rope scaling {kind!r} no factor; it is needed")
        factor = max_len / original if kind in ("yarn", "longrope") else 1.0
    attention_factor = _first(given, "attention_factor")
    if attention_factor is None:
        attention_factor = _attention_factor(kind, float(factor), original, given)
    rope = RopeConfig(
        theta=float(
            _first(given, "rope_theta", default=_first(read, "rope_theta", "rotary_emb_base"))
        ),
        rotary_dim=int(head_dim * share),
        kind=kind,
        factor=float(factor),
        original_max_len=max_len if kind == "dynamic" else original,
        attention_factor=float(attention_factor),
        low_freq_factor=float(_first(given, "low_freq_factor", default=1.0)),
        high_freq_factor=float(_first(given, "high_freq_factor", default=4.0)),
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        truncate=bool(given.get("truncate", True)),
        short_factor=tuple(given.get("short_factor") or ()),
        long_factor=tuple(given.get("long_factor") or ()),
    )
    for name in ("short_factor", "long_factor"):
        found, needed = len(getattr(rope, name)), -(-rope.rotary_dim // 2)
        if kind == "longrope" and found != needed:
            raise ConfigError(
                f"rope scaling 'longrope' has {found} values in {name}; {needed} are needed"
            )
    return rope


def _attention_factor(kind: str, factor: float, original: int, given: Mapping[str, Any]) -> float:
    """The scale on cos and sin: YaRN (arXiv:2309.00071) and LongRoPE (arXiv:2402.13753)."""
    if factor <= 1 or kind not in ("yarn", "longrope"):
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))

    def grown(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1

    mscale, mscale_all_dim = given.get("mscale"), given.get("mscale_all_dim")
    return grown(mscale) / grown(mscale_all_dim) if mscale and mscale_all_dim else grown(1)


def _windows(read: Mapping[str, Any], kind: str, num_layers: int) -> tuple[int | None, ...]:
    window = read.get("sliding_window") if read.get("use_sliding_window", True) else None
    if window is None:
        return (None,) * num_layers
    if kinds := read.get("layer_types"):
        if len(kinds) != num_layers:
            raise ConfigError(f"{len(kinds)} layer_types are given for {num_layers} layers")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if kind == "gemma2":
        return tuple(window if layer % 2 == 0 else None for layer in range(num_layers))
    first = read.get("max_window_layers", 0)
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _moe(hf: Mapping[str, Any], read: Mapping[str, Any], kind: str, num_layers: int) -> MoeConfig:
    step, dense = read.get("decoder_sparse_step", 1), set(read.get("mlp_only_layers") or ())
    return MoeConfig(
        num_experts=_need(hf, "num_local_experts", "num_experts"),
        num_experts_per_tok=_need(hf, "num_experts_per_tok"),
        intermediate_size=_need(
            hf, "intermediate_size" if kind == "mixtral" else "moe_intermediate_size"
        ),
        norm_topk_prob=bool(read.get("norm_topk_prob", True)),
        is_sparse=tuple(
            layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)
        ),
    )


def _model_type(hf: Mapping[str, Any]) -> str:
    """By the architecture, which also chooses the family."""
    architectures = hf.get("architectures") or []
    if not architectures:
        raise ConfigError("config.json names no architecture; `architectures` is needed")
    if not isinstance(architectures, list) or not isinstance(architectures[0], str):
        raise ConfigError(
            f"config.json gives architectures {architectures!r}; a list of names is needed"
        )
    if architectures[0] not in _MODEL_TYPES:
        raise ConfigError(
            f"architecture {architectures[0]} is not supported; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    return _MODEL_TYPES[architectures[0]]


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The model that a Hugging Face config.json describes.

    Raises ConfigError for a field that is missing or not supported.
    """
    kind = _model_type(hf)
    if quantized := hf.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
        raise ConfigError(
            f"config.json gives quantization_config {method!r}; quantised checkpoints are not supported yet"
        )
    read = {name: hf.get(name, default) for name, default in _OPTIONAL[kind].items()}
    hidden = _size("hidden_size", _need(hf, "hidden_size", "n_embd", "n_embed"))
    layers = _size(
        "num_hidden_layers", _need(hf, "num_hidden_layers", "n_layer", "num_layers"), _MOST_LAYERS
    )
    heads = _size("num_attention_heads", _need(hf, "num_attention_heads", "n_head"), _MOST_HEADS)
    kv_heads = _size("num_key_value_heads", _first(read, "num_key_value_heads", default=heads))
    head_dim = _size("head_dim", _first(read, "head_dim", default=hidden // heads))
    if heads % kv_heads:
        raise ConfigError(f"{heads} query heads are not a multiple of {kv_heads} KV heads")
    if kind in ("gpt2", "bloom"):
        intermediate = _size("n_inner", _first(read, "n_inner", default=4 * hidden))
    else:
        intermediate = _size("intermediate_size", _need(hf, "intermediate_size", "ffn_dim"))
    max_len = _size(
        "max_position_embeddings",
        _first(read, "max_position_embeddings", "n_positions", "seq_length", default=2048),
    )
    activation = _first(
        read, "hidden_act", "hidden_activation", "activation_function", default="gelu_new"
    )
    if activation not in _ACTIVATIONS:
        raise ConfigError(
            f"activation {activation!r} is not supported; supported are {', '.join(_ACTIVATIONS)}"
        )
    if read.get("use_bidirectional_attention"):
        raise ConfigError("use_bidirectional_attention is set; only causal models are supported")
    scale = _first(read, "query_pre_attn_scalar", default=head_dim) ** -0.5
    has_bias = bool(read.get("enable_bias", kind in ("gpt2", "bloom")))
    attention_bias = has_bias or bool(read.get("attention_bias", False))
    if type(read["tie_word_embeddings"]) is not bool:
        raise ConfigError(
            f"config.json gives tie_word_embeddings {read['tie_word_embeddings']!r}; true or false is needed"
        )
    is_norm_first = bool(read.get("do_layer_norm_before", True))
    return ModelConfig(
        architecture=hf["architectures"][0],
        model_type=kind,
        dtype=str(_first(hf, "dtype", "torch_dtype", default="float32")).removeprefix("torch."),
        vocab_size=_size("vocab_size", _need(hf, "vocab_size")),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        max_position_embeddings=max_len,
        activation=_ACTIVATIONS[activation],
        norm_eps=float(
            _first(read, "rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", default=1e-5)
        ),
        tie_word_embeddings=bool(read["tie_word_embeddings"]),
        windows=_windows(read, kind, layers),
        attention_scale=scale if read.get("scale_attn_weights", True) else 1.0,
        rope=_rope(hf, read, head_dim, max_len) if kind not in ("gpt2", "opt", "bloom") else None,
        moe=_moe(hf, read, kind, layers) if kind in ("mixtral", "qwen3_moe") else None,
        has_qkv_bias=attention_bias or kind == "qwen2",
        has_out_bias=attention_bias,
        has_mlp_bias=has_bias or kind == "gpt_neox" or bool(read.get("mlp_bias", False)),
        has_norm_params=bool(read.get("layer_norm_elementwise_affine", True)),
        attention_softcap=read.get("attn_logit_softcapping"),
        final_softcap=read.get("final_logit_softcapping"),
        embedding_dim=_first(read, "word_embed_proj_dim", default=hidden),
        position_offset=2 if kind == "opt" else 0,
        is_norm_first=is_norm_first,
        has_final_norm=is_norm_first and not read.get("_remove_final_layer_norm", False),
        has_parallel_residual=bool(read.get("use_parallel_residual", False)),
        has_residual_after_norm=bool(read.get("apply_residual_connection_post_layernorm", False)),
        has_scale_by_layer=bool(read.get("scale_attn_by_inverse_layer_idx", False)),
    )
