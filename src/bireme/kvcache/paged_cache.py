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

    @property
    def bytes_per_place(self) -> int:
        """Of its keys; of its values as many."""
        return self.keys[0].nbytes

    def write(self, places: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """k and v [T, K, D] go to places [T]."""
        self.keys.index_copy_(0, places, k)
        self.values.index_copy_(0, places, v)

    def read(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """places [B, C] -> keys and values [B, K, C, D], each place's heads in one piece."""
        rows = places.flatten()
        keys, values = (x.index_select(0, rows) for x in (self.keys, self.values))
        return (
            keys.unflatten(0, places.shape).transpose(1, 2),
            values.unflatten(0, places.shape).transpose(1, 2),
        )
