"""Attention of one rank: its heads, its share of the cache, and what one step tells every layer.

Shapes: T tokens of a step, H local query heads, K local KV heads, D head size, B sequences,
t tokens a sequence, C context tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from bireme.kernels.attention import attention, attention_bias
from bireme.kernels.functional import apply_rope
from bireme.kvcache.paged_cache import PagedCache
from bireme.model_config import ModelConfig
from bireme.parallel.layers import QKVParallelLinear, RowParallelLinear
from bireme.parallel.layout import IDENTITY, HeadCut, KVShare, View, head_edges
from bireme.parallel.mesh import Mesh


@dataclass
class SequenceGroup:
    """Sequences of a step with equal numbers of new tokens, attended to in one call.

    rows [B, t] of the step's tokens; context [B, C] places of the cache, padded with place 0.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    context: torch.Tensor
    _biases: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def bias(self, window: int | None, slopes: torch.Tensor | None) -> torch.Tensor:
        """[B, 1 or H, t, C], made once a step and window."""
        if window not in self._biases:
            self._biases[window] = attention_bias(
                self.positions, self.context.shape[1], window, slopes
            )
        return self._biases[window]


@dataclass
class StepContext:
    """What every layer of a stage must know of a step: positions [T], places [T] of the new keys,
    cos and sin [T, rotary_dim / 2], and the cache of each of the stage's layers."""

    positions: torch.Tensor
    places: torch.Tensor
    groups: list[SequenceGroup]
    caches: dict[int, PagedCache]
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """float32 [num_heads]: 2^(-8i/n) for a power of two, and every second slope of 2n beyond it
    (arXiv:2108.12409)."""

    def powers(count: int) -> list[float]:
        return [2 ** (-8 * (index + 1) / count) for index in range(count)]

    whole = 1 << (num_heads.bit_length() - 1)
    return torch.tensor(powers(whole) + powers(2 * whole)[0::2][: num_heads - whole])


class PagedAttention(nn.Module):
    """Writes new keys and values to the cache and attends to each sequence's context.

    `head_map` says which local KV head each local query head reads, so that their ratio need not
    be the same on every rank or for every head.
    """

    def __init__(
        self, config: ModelConfig, cut: HeadCut, layer: int, *, has_alibi: bool = False
    ) -> None:
        super().__init__()
        self.layer, self.cut = layer, cut
        self.window = config.windows[layer]
        self.scale = config.attention_scale / (layer + 1 if config.has_scale_by_layer else 1)
        self.cap = config.attention_softcap
        self.num_heads = config.num_heads
        self.has_alibi = has_alibi
        is_plain = cut.head_map == tuple(range(cut.num_local_kv_heads))
        self.head_map = None if is_plain else list(cut.head_map)

    @property
    def kv_share(self) -> KVShare:
        return KVShare(2 * self.cut.num_local_kv_heads * self.cut.head_dim, self.window)

    def _slopes(self, device: torch.device) -> torch.Tensor | None:
        return (
            alibi_slopes(self.num_heads)[slice(*self.cut.queries)].to(device)
            if self.has_alibi
            else None
        )

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: StepContext
    ) -> torch.Tensor:
        """q [T, H, D], k and v [T, K, D] -> [T, H * D]."""
        cache = step.caches[self.layer]
        cache.write(step.places, k, v)
        out = torch.empty_like(q)
        slopes = self._slopes(q.device)
        for group in step.groups:
            keys, values = (x.transpose(1, 2) for x in cache.read(group.context))  # [B, K, C, D]
            if self.head_map is not None:
                keys, values = keys[:, self.head_map], values[:, self.head_map]
            bias = group.bias(self.window, slopes)
            attended = attention(
                q[group.rows].transpose(1, 2), keys, values, bias, self.scale, self.cap
            )
            out[group.rows] = attended.transpose(1, 2)
        return out.flatten(1)


class Attention(nn.Module):
    """Projections around `PagedAttention`; `names` are the tensors of q, k, v, or one fused."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        layer: int,
        names: Sequence[str],
        out_name: str,
        *,
        view: View = IDENTITY,
        out_view: View = IDENTITY,
        has_alibi: bool = False,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        edges = head_edges(config.num_heads, config.num_kv_heads, mesh.tp_size)
        queries = (edges[mesh.tp_rank], edges[mesh.tp_rank + 1])
        cut = HeadCut(config.num_heads, config.num_kv_heads, config.head_dim, queries)
        fused_name = f"{out_name.rpartition('.')[0]}.qkv" if len(names) > 1 else names[0]
        self.qkv = QKVParallelLinear(
            fused_name, names, cut, config.hidden_size, bias=config.has_qkv_bias, view=view
        )
        self.out = RowParallelLinear(
            out_name,
            mesh,
            (queries[0] * config.head_dim, queries[1] * config.head_dim),
            config.num_heads * config.head_dim,
            config.hidden_size,
            unit="query head",
            bias=config.has_out_bias,
            view=out_view,
        )
        self.head_dim, self.rotary_scale = (
            config.head_dim,
            config.rope and config.rope.attention_factor,
        )
        self.q_norm, self.k_norm = q_norm, k_norm
        self.paged = PagedAttention(config, cut, layer, has_alibi=has_alibi)

    def forward(self, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]"""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv(x))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if step.cos is not None and step.sin is not None:
            q, k = apply_rope(q, step.cos, step.sin), apply_rope(k, step.cos, step.sin)
        out: torch.Tensor = self.out(self.paged(q, k, v, step))
        return out
