"""What a model is, read from a Hugging Face config.json.

`from_hf` is the one place that meets that file's aliases, defaults and old spellings
(`rope_scaling`, `torch_dtype`, `n_embd`...). Everything behind it reads `ModelConfig`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bireme.errors import CheckpointError, ConfigError

_TIED_BY_DEFAULT = {"gpt2", "opt", "bloom", "gemma2"}
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: base, rotated share of the head, and the scaling of long contexts.

    `original_max_len` is the length that the model was trained at before scaling (tokens).
    """

    theta: float = 10000.0
    rotary_dim: int
    kind: str = "default"
    factor: float = 1.0
    original_max_len: int
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Mixture of experts; `is_sparse[i]` says whether layer i routes or has one dense MLP."""

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    norm_topk_prob: bool
    is_sparse: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A language model's shape and behaviour; sizes in elements, lengths in tokens.

    `windows[i]` is layer i's sliding window (None: full attention).
    `position_offset` is added to a position before the learned position table is read (OPT: 2).
    """

    architecture: str
    model_type: str
    dtype: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    activation: str
    norm_eps: float
    tie_word_embeddings: bool
    windows: tuple[int | None, ...]
    attention_scale: float
    rope: RopeConfig | None = None
    moe: MoeConfig | None = None
    has_qkv_bias: bool = False
    has_out_bias: bool = False
    has_mlp_bias: bool = False
    has_norm_params: bool = True
    attention_softcap: float | None = None
    final_softcap: float | None = None
    embedding_dim: int
    position_offset: int = 0
    is_norm_first: bool = True
    has_final_norm: bool = True
    has_parallel_residual: bool = False
    has_residual_after_norm: bool = False
    has_scale_by_layer: bool = False

    @property
    def max_model_len(self) -> int:
        """The longest context (tokens) that the positions are made for, scaling included."""
        rope = self.rope
        if rope is None:
            return self.max_position_embeddings
        if rope.kind in ("linear", "dynamic"):
            return int(self.max_position_embeddings * rope.factor)
        if rope.kind == "yarn":
            return max(self.max_position_embeddings, int(rope.original_max_len * rope.factor))
        return self.max_position_embeddings

    @property
    def num_queries_per_kv(self) -> int:
        return self.num_heads // self.num_kv_heads


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; CheckpointError names the file if it holds no such thing."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; it is no model folder") from None
    except (ValueError, OSError) as error:
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
        raise ConfigError(
            f"config.json has no {' or '.join(names)}; it is needed for a {hf.get('model_type')} model"
        )
    return value


def _rope(hf: Mapping[str, Any], head_dim: int, max_len: int) -> RopeConfig:
    """From `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before it)."""
    given = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    kind = _first(given, "rope_type", "type", default="default")
    kind = {"su": "longrope", "ntk": "dynamic"}.get(kind, kind)
    if kind not in _ROPE_KINDS:
        raise ConfigError(
            f"rope scaling {kind!r} is not supported; supported are {', '.join(_ROPE_KINDS)}"
        )
    share = _first(given, "partial_rotary_factor", default=None)
    if share is None:
        share = _first(hf, "partial_rotary_factor", "rotary_pct", default=1.0)
    original = int(
        _first(given, "original_max_position_embeddings", default=None)
        or _first(hf, "original_max_position_embeddings", default=max_len)
    )
    factor = _first(given, "factor")
    if factor is None:
        factor = max_len / original if kind in ("yarn", "longrope") else 1.0
    attention_factor = _first(given, "attention_factor")
    if attention_factor is None:
        attention_factor = _attention_factor(kind, float(factor), original, given)
    return RopeConfig(
        theta=float(
            _first(given, "rope_theta", default=None)
            or _first(hf, "rope_theta", "rotary_emb_base", default=10000.0)
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


def _attention_factor(kind: str, factor: float, original: int, given: Mapping[str, Any]) -> float:
    """The scale on cos and sin: YaRN (arXiv:2309.00071) and LongRoPE (arXiv:2402.13753)."""
    if factor <= 1 or kind not in ("yarn", "longrope"):
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    mscale, mscale_all_dim = given.get("mscale"), given.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all_dim * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1


def _windows(hf: Mapping[str, Any], model_type: str, num_layers: int) -> tuple[int | None, ...]:
    window = hf.get("sliding_window")
    if model_type.startswith("qwen") and not hf.get("use_sliding_window", False):
        window = None
    if window is None:
        return (None,) * num_layers
    if kinds := hf.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if model_type == "gemma2":
        return tuple(window if layer % 2 == 0 else None for layer in range(num_layers))
    if model_type in ("qwen2", "qwen3"):
        first = hf.get("max_window_layers", 28)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    return (window,) * num_layers


def _moe(hf: Mapping[str, Any], num_layers: int, intermediate_size: int) -> MoeConfig | None:
    num_experts = _first(hf, "num_local_experts", "num_experts")
    if num_experts is None:
        return None
    step = hf.get("decoder_sparse_step", 1)
    dense = set(hf.get("mlp_only_layers") or ())
    return MoeConfig(
        num_experts=num_experts,
        num_experts_per_tok=_need(hf, "num_experts_per_tok"),
        intermediate_size=_first(hf, "moe_intermediate_size", default=intermediate_size),
        norm_topk_prob=hf.get("norm_topk_prob", hf.get("model_type") == "mixtral"),
        is_sparse=tuple(
            layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)
        ),
    )


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The model that a Hugging Face config.json describes.

    Raises ConfigError for a field that is missing or not supported.
    """
    architectures = hf.get("architectures") or []
    if not architectures:
        raise ConfigError("config.json names no architecture; `architectures` is needed")
    kind = str(hf.get("model_type", ""))
    hidden = _need(hf, "hidden_size", "n_embd")
    layers = _need(hf, "num_hidden_layers", "n_layer", "num_layers")
    heads = _need(hf, "num_attention_heads", "n_head")
    kv_heads = _first(hf, "num_key_value_heads", default=heads)
    head_dim = _first(hf, "head_dim", default=hidden // heads)
    if heads % kv_heads:
        raise ConfigError(f"{heads} query heads are not a multiple of {kv_heads} KV heads")
    intermediate = _first(hf, "intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
    max_len = _first(hf, "max_position_embeddings", "n_positions", "seq_length", default=2048)
    has_rope = kind not in ("gpt2", "opt", "bloom")
    activation = _first(
        hf, "hidden_activation", "hidden_act", "activation_function", default="gelu_new"
    )
    if activation not in _ACTIVATIONS:
        raise ConfigError(
            f"activation {activation!r} is not supported; supported are {', '.join(_ACTIVATIONS)}"
        )
    scale = _first(hf, "query_pre_attn_scalar", default=head_dim) ** -0.5
    opt_bias = bool(hf.get("enable_bias", True))
    classic_bias = {"gpt2": True, "bloom": True, "opt": opt_bias}.get(kind, False)
    attention_bias = bool(hf.get("attention_bias", kind == "gpt_neox"))
    return ModelConfig(
        architecture=architectures[0],
        model_type=kind,
        dtype=str(_first(hf, "dtype", "torch_dtype", default="float32")).removeprefix("torch."),
        vocab_size=_need(hf, "vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        max_position_embeddings=max_len,
        activation=_ACTIVATIONS[activation],
        norm_eps=float(
            _first(hf, "rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", default=1e-5)
        ),
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", kind in _TIED_BY_DEFAULT)),
        windows=_windows(hf, kind, layers),
        attention_scale=1.0 if hf.get("scale_attn_weights") is False else scale,
        rope=_rope(hf, head_dim, max_len) if has_rope else None,
        moe=_moe(hf, layers, intermediate),
        has_qkv_bias=classic_bias or attention_bias or kind == "qwen2",
        has_out_bias=classic_bias or attention_bias,
        has_mlp_bias=classic_bias or kind == "gpt_neox" or bool(hf.get("mlp_bias", False)),
        has_norm_params=bool(hf.get("layer_norm_elementwise_affine", True)),
        attention_softcap=hf.get("attn_logit_softcapping"),
        final_softcap=hf.get("final_logit_softcapping"),
        embedding_dim=_first(hf, "word_embed_proj_dim", default=hidden),
        position_offset=2 if kind == "opt" else 0,
        is_norm_first=bool(hf.get("do_layer_norm_before", True)),
        has_final_norm=bool(hf.get("do_layer_norm_before", True))
        and not hf.get("_remove_final_layer_norm", False),
        has_parallel_residual=kind == "gpt_neox" and bool(hf.get("use_parallel_residual", True)),
        has_residual_after_norm=bool(hf.get("apply_residual_connection_post_layernorm", False)),
        has_scale_by_layer=bool(hf.get("scale_attn_by_inverse_layer_idx", False)),
    )
