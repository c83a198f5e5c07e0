"""The cache's tensors on one rank, one pair a layer.

Shapes: N blocks, P places a block, K KV heads, D head size.
"""

from __future__ import annotations

import torch


class PagedCache:
    """Keys and values of one attention layer, [N * P, K, D] each; place = block * P + offset."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_blocks * block_size, num_kv_heads, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.keys[:block_size] = 0  # the null block is read by padding: it must hold numbers
        self.values[:block_size] = 0

        self._heads = torch.arange(num_kv_heads, device=device).unsqueeze(1)

    def write(self, places: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """k and v [T, K, D] go to places [T]."""
        self.keys.index_copy_(0, places, k)
        self.values.index_copy_(0, places, v)

    def read(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """places [B, C] -> keys and values [B, K, C, D], each head's context in one piece."""
        shape = (len(places), len(self._heads), places.shape[1], -1)
        rows = (places.unsqueeze(1) * len(self._heads) + self._heads).flatten()  # [B, K, C]
        keys, values = (x.flatten(0, 1).index_select(0, rows) for x in (self.keys, self.values))
        return keys.view(shape), values.view(shape)
