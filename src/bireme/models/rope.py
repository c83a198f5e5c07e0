"""Rotary frequencies (arXiv:2104.09864) and how long contexts scale them."""

from __future__ import annotations

import math

import torch

from bireme.model_config import RopeConfig

_LENGTH_DEPENDENT = ("dynamic", "longrope")


def depends_on_length(rope: RopeConfig) -> bool:
    """True where frequencies follow a request's admitted maximum length."""
    return rope.kind in _LENGTH_DEPENDENT


def inverse_frequencies(rope: RopeConfig, max_len: int) -> torch.Tensor:
    """float32 [rotary_dim / 2] for a request of at most `max_len` tokens."""
    exponent = torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim
    if rope.kind == "dynamic":
        return 1.0 / _dynamic_base(rope, max_len) ** exponent
    plain = 1.0 / rope.theta**exponent
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, plain)
    if rope.kind == "longrope":
        is_long = max_len > rope.original_max_len
        return 1.0 / (
            torch.tensor(rope.long_factor if is_long else rope.short_factor) * rope.theta**exponent
        )
    return plain


def _dynamic_base(rope: RopeConfig, max_len: int) -> float:
    """NTK-aware scaling that grows with the context."""
    length = max(max_len, rope.original_max_len)
    growth = rope.factor * length / rope.original_max_len - (rope.factor - 1)
    return float(rope.theta * growth ** (rope.rotary_dim / (rope.rotary_dim - 2)))


def _llama3(rope: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long wavelengths divided by the factor, short ones kept, a ramp between."""
    wavelength = 2 * math.pi / plain
    ramp = (rope.original_max_len / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    ramp = ramp.clamp(0, 1)
    return (1 - ramp) * plain / rope.factor + ramp * plain


def _yarn(rope: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """YaRN (arXiv:2309.00071): interpolate slow dims, keep fast ones, a ramp between."""

    def dim_of(num_rotations: float) -> float:
        turns = rope.original_max_len / (num_rotations * 2 * math.pi)
        return rope.rotary_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    span = high - low or 0.001
    ramp = ((torch.arange(rope.rotary_dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)
