"""From the fields of a config.json to a `ModelConfig`."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from bireme.errors import ConfigError
from bireme.hf_config.fields import ACTIVATIONS, model_type, needed_field, optional_fields
from bireme.hf_config.readers import read, text, whole
from bireme.hf_config.rope import rope_config
from bireme.model_config import ModelConfig, MoeConfig


def _first(fields: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    """The first of `names` that is present and not None."""
    return next((fields[name] for name in names if fields.get(name) is not None), default)


def _windows(fields: Mapping[str, Any], kind: str, num_layers: int) -> tuple[int | None, ...]:
    window = fields.get("sliding_window") if fields.get("use_sliding_window", True) else None
    if window is None:
        return (None,) * num_layers
    if kinds := fields.get("layer_types"):
        if len(kinds) != num_layers:
            raise ConfigError(f"{len(kinds)} layer_types are given for {num_layers} layers")
        return tuple(window if name == "sliding_attention" else None for name in kinds)
    if kind == "gemma2":
        return tuple(window if layer % 2 == 0 else None for layer in range(num_layers))
    first = fields.get("max_window_layers", 0)
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _moe(hf: Mapping[str, Any], fields: Mapping[str, Any], kind: str, num_layers: int) -> MoeConfig:
    step, dense = fields.get("decoder_sparse_step", 1), fields.get("mlp_only_layers") or ()
    num_experts = needed_field(hf, "num_local_experts", "num_experts")
    num_chosen = needed_field(hf, "num_experts_per_tok")
    if num_chosen > num_experts:
        raise ConfigError(
            f"num_experts_per_tok {num_chosen} exceeds the {num_experts} experts; "
            f"at most {num_experts} is needed"
        )
    return MoeConfig(
        num_experts=num_experts,
        num_experts_per_tok=num_chosen,
        intermediate_size=needed_field(
            hf, "intermediate_size" if kind == "mixtral" else "moe_intermediate_size"
        ),
        norm_topk_prob=fields.get("norm_topk_prob", True),
        is_sparse=tuple(
            layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)
        ),
    )


def _check_not_quantised(hf: Mapping[str, Any]) -> None:
    if quantized := hf.get("quantization_config"):
        keys = list(quantized) if isinstance(quantized, Mapping) else quantized
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else None
        raise ConfigError(
            f"config.json gives quantization_config {reprlib.repr(method or keys)}; "
            "quantised checkpoints are not supported yet"
        )


def _heads(hf: Mapping[str, Any], fields: Mapping[str, Any], hidden: int) -> tuple[int, int, int]:
    """Query heads, KV heads, and the size of each."""
    heads: int = needed_field(hf, "num_attention_heads", "n_head")
    kv_heads: int = _first(fields, "num_key_value_heads", default=heads)
    head_dim: int = read("head_dim", _first(fields, "head_dim", default=hidden // heads), whole())
    if heads % kv_heads:
        raise ConfigError(f"{heads} query heads are not a multiple of {kv_heads} KV heads")
    return heads, kv_heads, head_dim


def _intermediate(hf: Mapping[str, Any], fields: Mapping[str, Any], kind: str, hidden: int) -> int:
    size: int
    if kind in ("gpt2", "bloom"):
        size = _first(fields, "n_inner", default=4 * hidden)
    else:
        size = needed_field(hf, "intermediate_size", "ffn_dim")
    return size


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The model that a Hugging Face config.json describes.

    Raises ConfigError for a field that is missing or not supported.
    """
    kind = model_type(hf)
    _check_not_quantised(hf)
    fields = optional_fields(hf, kind)
    hidden = needed_field(hf, "hidden_size", "n_embd", "n_embed")
    layers = needed_field(hf, "num_hidden_layers", "n_layer", "num_layers")
    heads, kv_heads, head_dim = _heads(hf, fields, hidden)
    max_len = _first(fields, "max_position_embeddings", "n_positions", "seq_length")
    activation = _first(
        fields, "hidden_act", "hidden_activation", "activation_function", default="gelu_new"
    )
    if fields.get("use_bidirectional_attention"):
        raise ConfigError("use_bidirectional_attention is set; only causal models are supported")
    scale = _first(fields, "query_pre_attn_scalar", default=head_dim) ** -0.5
    has_rope = kind not in ("gpt2", "opt", "bloom")
    has_bias = fields.get("enable_bias", kind in ("gpt2", "bloom"))
    attention_bias = has_bias or fields.get("attention_bias", False)
    is_norm_first = fields.get("do_layer_norm_before", True)
    dtype = read("dtype", _first(hf, "dtype", "torch_dtype", default="float32"), text)
    return ModelConfig(
        architecture=hf["architectures"][0],
        model_type=kind,
        dtype=dtype.removeprefix("torch."),
        vocab_size=needed_field(hf, "vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=_intermediate(hf, fields, kind, hidden),
        max_position_embeddings=max_len,
        activation=ACTIVATIONS[activation],
        norm_eps=_first(
            fields, "rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", default=1e-5
        ),
        tie_word_embeddings=fields["tie_word_embeddings"],
        windows=_windows(fields, kind, layers),
        attention_scale=scale if fields.get("scale_attn_weights", True) else 1.0,
        rope=rope_config(hf, fields, head_dim, max_len) if has_rope else None,
        moe=_moe(hf, fields, kind, layers) if kind in ("mixtral", "qwen3_moe") else None,
        has_qkv_bias=attention_bias or kind == "qwen2",
        has_out_bias=attention_bias,
        has_mlp_bias=has_bias or kind == "gpt_neox" or fields.get("mlp_bias", False),
        has_norm_params=fields.get("layer_norm_elementwise_affine", True),
        attention_softcap=fields.get("attn_logit_softcapping"),
        final_softcap=fields.get("final_logit_softcapping"),
        embedding_dim=_first(fields, "word_embed_proj_dim", default=hidden),
        position_offset=2 if kind == "opt" else 0,
        is_norm_first=is_norm_first,
        has_final_norm=is_norm_first and not fields.get("_remove_final_layer_norm", False),
        has_parallel_residual=fields.get("use_parallel_residual", False),
        has_residual_after_norm=fields.get("apply_residual_connection_post_layernorm", False),
        has_scale_by_layer=fields.get("scale_attn_by_inverse_layer_idx", False),
    )


def eos_token_ids(
    hf: Mapping[str, Any], generation: Mapping[str, Any], vocab_size: int
) -> frozenset[int]:
    """The ids that end an answer: those of generation_config.json where it gives the field."""
    file, fields = ("config.json", hf)
    if "eos_token_id" in generation:
        file, fields = ("generation_config.json", generation)
    eos = fields.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    in_vocabulary = whole(0, vocab_size - 1)
    return frozenset(read("eos_token_id", id_, in_vocabulary, file) for id_ in ids)
