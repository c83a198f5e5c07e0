"""Gumbel noise as a counter hash of (seed, choice, position, vocabulary id).

Integer arithmetic only until the last step, so that the draw is the same on every device and at
every layout: each vocabulary shard draws its own part.
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijective hash of 32-bit values held in int64."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def gumbel_noise(
    seeds: torch.Tensor, choices: torch.Tensor, positions: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """float64 [S, V] for rows of (seed, choice, position), each int64 [S], and ids int64 [V]."""
    low = _mix((seeds & _MASK) ^ _mix(positions & _MASK))
    high = _mix(((seeds >> 32) & _MASK) ^ _mix((choices + 0x9E3779B9) & _MASK))
    x = _mix(ids.unsqueeze(0) ^ low.unsqueeze(1))
    x = _mix((x + high.unsqueeze(1)) & _MASK)
    uniform = (x.double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log(uniform))
