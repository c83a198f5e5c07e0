"""Gumbel noise as a counter hash of (seed, choice, position, vocabulary id).

Integer arithmetic only until the last step, so that the draw is the same on every device and at
every layout: each vocabulary shard draws its own part. Words of 32 bits are held in int32, whose
products and sums wrap; a shift to the right is followed by a mask, for it copies the sign.
"""

from __future__ import annotations

import torch

_GOLDEN = 0x9E3779B9 - 2**32
_SIGN = -(2**31)


def mix_(x: torch.Tensor) -> torch.Tensor:
    """A bijective hash of 32-bit words (lowbias32 of Wellons' hash-prospector), in place."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def _words(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The low and the high word of int64 values."""
    return x.to(torch.int32), (x >> 32).to(torch.int32)


def gumbel_noise(
    seeds: torch.Tensor, choices: torch.Tensor, positions: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """float64 [S, V] for rows of (seed, choice, position), each int64 [S], and ids int64 [V]."""
    low, high = _words(seeds)
    low = mix_(low ^ mix_(_words(positions)[0]))
    high = mix_(high ^ mix_(_words(choices)[0] + _GOLDEN))
    x = mix_(ids.to(torch.int32) ^ low.unsqueeze(1))
    x = mix_(x.add_(high.unsqueeze(1)))
    unsigned = x.bitwise_xor_(_SIGN).double().add_(2.0**31)
    return unsigned.add_(0.5).mul_(2.0**-32).log_().neg_().log_().neg_()
