"""How a config.json says what its rotary embedding is, today and before transformers 5."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from bireme.errors import ConfigError
from bireme.hf_config.readers import flag, list_of, number, one_of, optional, read, whole
from bireme.model_config import RopeConfig

_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
_OLD_KINDS = {"su": "longrope", "ntk": "dynamic"}
_KIND = optional(one_of((*_KINDS, *_OLD_KINDS)))
_POSITIVE = optional(number(1e-6))
_FACTORS = optional(list_of(number(1e-6)))
_READERS = {
    "rope_type": _KIND,
    "type": _KIND,
    "rope_theta": optional(number(1.01, 1e30)),
    "partial_rotary_factor": optional(number(0, 1)),
    "factor": optional(number(1, 1e6)),
    "original_max_position_embeddings": optional(whole(2)),
    "attention_factor": _POSITIVE,
    "low_freq_factor": _POSITIVE,
    "high_freq_factor": _POSITIVE,
    "beta_fast": _POSITIVE,
    "beta_slow": _POSITIVE,
    "mscale": optional(number()),
    "mscale_all_dim": optional(number()),
    "truncate": flag,
    "short_factor": _FACTORS,
    "long_factor": _FACTORS,
}


def _scaling(hf: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` (transformers 5) over `rope_scaling` (before it): what they give."""
    given: dict[str, Any] = {}
    for container in ("rope_scaling", "rope_parameters"):
        fields = hf.get(container)
        if not isinstance(fields, dict | None):
            raise ConfigError(
                f"config.json gives {container} {reprlib.repr(fields)}; an object is needed"
            )
        for name, value in (fields or {}).items():
            if isinstance(value, dict):
                raise ConfigError(
                    f"config.json gives {container} by {name}; one for all layers is needed"
                )
            if name in _READERS:
                given[name] = read(f"{container}.{name}", value, _READERS[name])
    return {name: value for name, value in given.items() if value is not None}


def rope_config(
    hf: Mapping[str, Any], read_fields: Mapping[str, Any], head_dim: int, max_len: int
) -> RopeConfig:
    """`read_fields` are those beside the scaling: base and share as they were spelled there."""
    given = _scaling(hf)
    kind = given.get("rope_type", given.get("type", "default"))
    kind = _OLD_KINDS.get(kind, kind)
    theta, share = (
        next(value for name in names if (value := {**read_fields, **given}.get(name)) is not None)
        for names in (("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct"))
    )
    original = read_fields.get("original_max_position_embeddings")
    original = original or given.get("original_max_position_embeddings", max_len)
    factor = given.get("factor")
    if factor is None:
        if kind in ("linear", "dynamic", "llama3"):
            raise ConfigError(f"config.json gives rope scaling {kind!r} no factor; it is needed")
        factor = max_len / original if kind in ("yarn", "longrope") else 1.0
    rope = RopeConfig(
        theta=theta,
        rotary_dim=int(head_dim * share),
        kind=kind,
        factor=factor,
        original_max_len=max_len if kind == "dynamic" else original,
        attention_factor=given.get("attention_factor")
        or _attention_factor(kind, factor, original, given),
        low_freq_factor=given.get("low_freq_factor", 1.0),
        high_freq_factor=given.get("high_freq_factor", 4.0),
        beta_fast=given.get("beta_fast", 32.0),
        beta_slow=given.get("beta_slow", 1.0),
        truncate=given.get("truncate", True),
        short_factor=given.get("short_factor", ()),
        long_factor=given.get("long_factor", ()),
    )
    _check(rope, head_dim)
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


def _check(rope: RopeConfig, head_dim: int) -> None:
    """What only several fields together can get wrong."""
    least = 4 if rope.kind == "dynamic" else 2
    if rope.rotary_dim % 2 or rope.rotary_dim < least:
        raise ConfigError(
            f"rope turns {rope.rotary_dim} of {head_dim} dims a head; "
            f"an even number from {least} is needed"
        )
    if rope.kind == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        raise ConfigError(
            f"rope scaling 'llama3' has low_freq_factor {rope.low_freq_factor:g} and "
            f"high_freq_factor {rope.high_freq_factor:g}; the second must be larger"
        )
    for name in ("short_factor", "long_factor") if rope.kind == "longrope" else ():
        found, needed = len(getattr(rope, name)), rope.rotary_dim // 2
        if found != needed:
            raise ConfigError(
                f"rope scaling 'longrope' has {found} values in {name}; {needed} are needed"
            )
