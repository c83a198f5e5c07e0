"""What rows ask of the choice of their next id, and the digits by which a threshold is found for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

RADIX = ((21, 11), (10, 11), (0, 10))  # (shift, bits) from the top of a 32-bit key


@dataclass(frozen=True)
class Draws:
    """Tensors [S], of each row; top_k 0, top_p 1 and min_p 0 keep all.

    `has_*` say on the host whether any row filters so.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    choices: torch.Tensor
    positions: torch.Tensor
    has_top_k: bool = False
    has_top_p: bool = False
    has_min_p: bool = False

    @property
    def is_filtered(self) -> bool:
        return self.has_top_k or self.has_top_p or self.has_min_p
