"""Attention of one rank: its heads, and its share of the cache.

Shapes: T tokens of a step, H local query heads, K local KV heads, D head size, B sequences,
t tokens a sequence, C context tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import nn

from bireme.kernels.attention import (
    COPIED_BYTES,
    grouped_query_attention,
)
from bireme.kernels.choice import suits_c, suits_c_attention
from bireme.kernels.cpu.ops import decode_attention, rope_and_write
from bireme.kernels.functional import apply_rope
from bireme.kernels.tiled_attention import SPLIT, Scoring, tiled_attention
from bireme.kvcache.paged_cache import PagedCache
from bireme.model_config import ModelConfig
from bireme.models.step import PagedStep, SequenceGroup, StepContext, Tile
from bireme.parallel.cuts import HeadCut, head_edges
from bireme.parallel.layers import QKVParallelLinear, RowParallelLinear
from bireme.parallel.layout import IDENTITY, KVSpec, StepWork, View
from bireme.parallel.mesh import Mesh, TensorGroup


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
        self._head_index: torch.Tensor | None = None
        self._slopes: torch.Tensor | None = None
        self._head_map: torch.Tensor | None = None
        self._head_starts: torch.Tensor | None = None

    @property
    def kv_spec(self) -> KVSpec:
        return KVSpec(2 * self.cut.num_local_kv_heads * self.cut.head_dim, self.window)

    @property
    def work(self) -> StepWork:
        cut, has_scores = self.cut, self.has_alibi or self.cap is not None
        copied = 2 * cut.num_local_heads * cut.head_dim if self._is_copied else 0
        return StepWork(
            # and for each head its place, then its scores: 12 bytes
            place_elements=self.kv_spec.elements_per_token + copied + 6 * cut.num_local_heads,
            score_elements=4 + 3 * (cut.num_local_heads if has_scores else 0),
            copied_bytes=2 * COPIED_BYTES,
        )

    @property
    def _is_copied(self) -> bool:
        """True where KV heads are copied to their query heads: those share them unevenly."""
        return self.cut.num_shared is None or (self.has_alibi and self.cut.num_shared > 1)

    def place_on(self, device: torch.device) -> None:
        """Puts the constants of this rank's heads on the device, once."""
        head_map = torch.tensor(self.cut.head_map)
        if self._is_copied:
            self._head_index = head_map.to(device)
        kv_heads = torch.arange(self.cut.num_local_kv_heads + 1)
        self._head_map = head_map.int().to(device)
        self._head_starts = torch.searchsorted(head_map, kv_heads).int().to(device)
        if self.has_alibi:
            slopes = alibi_slopes(self.num_heads)[slice(*self.cut.queries)]
            self._slopes = slopes.to(device)

    def write(self, k: torch.Tensor, v: torch.Tensor, step: StepContext) -> None:
        """k and v [T, K, D], to the step's places."""
        places = step.places[self.window]
        step.caches[self.layer].write(places, k[: len(places)], v[: len(places)])

    def forward(
        self, q: torch.Tensor, step: StepContext, qkv: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[T, H, D] -> [T, H * D], of tokens whose keys and values are written, and may lie in rows of qkv too."""
        cache = step.caches[self.layer]
        if step.paged is not None:
            return self.attend_paged(q, step.positions, step.paged, cache, qkv)
        if step.tile is not None:
            return self._attend_tile(q, step.tile, cache).flatten(1)
        if len(step.groups) == 1:  # its rows are the step's
            rows = q.view(*step.groups[0].rows.shape, *q.shape[1:])
            return self._attend(rows, step.groups[0], cache).reshape(len(q), -1)
        out = torch.empty_like(q)
        for group in step.groups:
            out[group.rows] = self._attend(q[group.rows], group, cache)
        return out.flatten(1)

    def attend_paged(
        self,
        q: torch.Tensor,
        positions: torch.Tensor,
        step: PagedStep,
        cache: PagedCache,
        qkv: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The same by the kernels of a GPU."""
        from bireme.kernels.gpu.prefill_attention import prefill_attention

        tiles = step.tiles
        if tiles is None:
            return self._decode_paged(q, positions, step, cache).flatten(1)
        assert self._head_map is not None
        out = prefill_attention(
            q, cache.keys, cache.values, step.tables[self.window], step.block_size, step.slots,
            tiles, self._head_map, self.scale, self.window, self.cap, self._slopes, qkv,
        )  # fmt: skip
        if tiles.num_singles:
            singles = slice(tiles.num_singles)
            out[singles] = self._decode_paged(q[singles], positions[singles], step, cache)
        return out.flatten(1)

    def _decode_paged(
        self, q: torch.Tensor, positions: torch.Tensor, step: PagedStep, cache: PagedCache
    ) -> torch.Tensor:
        """[B, H, D] -> [B, H, D], of the step's first rows, each the one new token of its sequence."""
        from bireme.kernels.gpu.decode_attention import decode_attention

        assert self._head_starts is not None
        most = max(map(self.cut.head_map.count, set(self.cut.head_map)))
        return decode_attention(
            q, cache.keys, cache.values, step.tables[self.window], step.block_size,
            step.slots[: len(q)], positions, step.splits[self.window], self._head_starts, most,
            self.scale, self.window, self.cap, self._slopes,
        )  # fmt: skip

    def _attend(self, q: torch.Tensor, group: SequenceGroup, cache: PagedCache) -> torch.Tensor:
        """[B, t, H, D] -> [B, t, H, D]"""
        context = group.context[self.window]
        num_keys = context.numel() * cache.keys[0].numel()
        if q.shape[1] == 1 and suits_c_attention(q, num_keys):
            assert self._head_map is not None
            out = decode_attention(
                q.squeeze(1), cache.keys, cache.values, context,
                group.positions, self._head_map, self.scale, self.window, self.cap, self._slopes,
            )  # fmt: skip
            return out.unsqueeze(1)
        q = q.transpose(1, 2)
        start = group.seen(group.slices[0], self.window)[0]
        places = context[:, start:]
        at_once = len(q)
        if q.device.type == "cpu":  # what was read is still in its cache when it is multiplied
            at_once = max(1, COPIED_BYTES // (places.shape[1] * cache.bytes_per_place))
        parts = [
            self._attend_some(q, slice(first, first + at_once), group, places, start, cache)
            for first in range(0, len(q), at_once)
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(1, 2)

    def _attend_some(
        self,
        q: torch.Tensor,
        some: slice,
        group: SequenceGroup,
        places: torch.Tensor,
        start: int,
        cache: PagedCache,
    ) -> torch.Tensor:
        """[B, H, t, D] of `some` of the sequences; places [B, C] of positions from `start`."""
        q, (keys, values) = q[some], cache.read(places[some])  # [B, K, C, D]
        if self._head_index is not None:
            keys, values = (x.index_select(1, self._head_index) for x in (keys, values))
        parts = []
        for queries in group.slices:
            bias = group.bias(queries, self.window, self._slopes, q.dtype)[some]
            first, stop = (position - start for position in group.seen(queries, self.window))
            k, v = keys[:, :, first:stop], values[:, :, first:stop]
            given = q[:, :, slice(*queries)], k, v, bias, self.scale, self.cap
            parts.append(grouped_query_attention(*given))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _attend_tile(self, q: torch.Tensor, tile: Tile, cache: PagedCache) -> torch.Tensor:
        """[N, H, D] -> [N, H, D]"""
        scoring = Scoring(self.scale, self.cap, self._slopes, self.window)
        return tiled_attention(q, self._splits(tile, cache), tile.positions, scoring)

    def _splits(
        self, tile: Tile, cache: PagedCache
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        context = tile.context[self.window]
        for first in range(0, context.shape[1], SPLIT):
            keys, values = cache.read(context[:, first : first + SPLIT])
            if self._head_index is not None:
                keys, values = (x.index_select(1, self._head_index) for x in (keys, values))
            yield first, keys, values


class HeadNorm(Protocol):
    """An RMSNorm of each head's elements."""

    weight: nn.Parameter
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


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
        q_norm: HeadNorm | None = None,
        k_norm: HeadNorm | None = None,
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

    @property
    def work(self) -> StepWork:
        """Projections and their rotated copies live at once, beside temporaries of the rotation."""
        rotation = 2 * self.qkv.sizes[0] if self.rotary_scale is not None else 0
        return StepWork(token_elements=2 * sum(self.qkv.sizes) + rotation)

    def forward(self, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]"""
        out: torch.Tensor = self.out(self._attended(x, step))
        return out

    def partial(self, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        """This rank's addend [T, hidden], or parts of it, float32 [P, T, hidden]."""
        return self.out.partial(self._attended(x, step))

    @property
    def group(self) -> TensorGroup:
        """Whose sum it is."""
        return self.out.mesh.tensor

    @property
    def has_bias(self) -> bool:
        """Behind the sum over ranks."""
        return "bias" in self.out.layouts

    def _attended(self, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        """[T, hidden] -> [T, H * D]"""
        own = None
        if step.paged is None:
            q = self._written(self.qkv(x), step)
        else:
            keeps = self._keeps_keys(step, step.paged)
            rows = self.qkv(x) if keeps or step.paged.is_probed else self.qkv.in_parts(x)
            q = self._written_paged(rows, step, keeps_keys=keeps)
            own = rows if keeps else None
        attended: torch.Tensor = self.paged(
            step.of_asked(q), step if step.asked is None else step.asked.step, own
        )
        return attended

    def _keeps_keys(self, step: StepContext, paged: PagedStep) -> bool:
        """Whether a run's own keys and values are read from the projected rows."""
        has_runs = step.asked is None and paged.tiles is not None
        return has_runs and self.paged.window is None and not paged.is_probed

    def _written(self, rows: torch.Tensor, step: StepContext) -> torch.Tensor:
        """Queries [T, H, D] of projected rows; their keys and values are in the cache."""
        if self.q_norm is not None:
            rows = self._normed(rows)
        paged = self.paged
        rotation = (step.cos, step.sin) if step.cos is not None and step.sin is not None else None
        if suits_c(rows):
            cache, places = step.caches[paged.layer], step.places[paged.window]
            return rope_and_write(
                rows, paged.cut.num_local_heads, rotation, places, cache.keys, cache.values
            )
        q: torch.Tensor
        num_queries, num_kv = paged.cut.num_local_heads, paged.cut.num_local_kv_heads
        heads = rows.unflatten(-1, (-1, self.head_dim))
        rotated, v = heads.split((num_queries + num_kv, num_kv), dim=1)
        if rotation is not None:
            rotated = apply_rope(rotated, *rotation)
        q, k = rotated.split((num_queries, num_kv), dim=1)
        paged.write(k, v, step)
        return q

    def _normed(self, rows: torch.Tensor) -> torch.Tensor:
        """The same rows with their heads normed."""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv.split(rows))
        assert self.q_norm is not None
        assert self.k_norm is not None
        return torch.cat((self.q_norm(q), self.k_norm(k), v), dim=1).flatten(1)

    def _written_paged(
        self, rows: torch.Tensor, step: StepContext, *, keeps_keys: bool
    ) -> torch.Tensor:
        """The same by the kernels of a GPU."""
        from bireme.kernels.gpu.rope_and_write import rope_and_write

        layer = self.paged
        cache, norms = step.caches[layer.layer], None
        if self.q_norm is not None and self.k_norm is not None:
            norms = self.q_norm.weight, self.k_norm.weight, self.q_norm.eps
            if step.paged is not None and step.paged.is_probed:
                rows, norms = self._normed(rows), None
        rotation = (step.cos, step.sin) if step.cos is not None and step.sin is not None else None
        return rope_and_write(
            rows, layer.cut.num_local_heads, rotation, norms, step.places[layer.window],
            cache.keys, cache.values, keeps_keys=keeps_keys,
        )  # fmt: skip
