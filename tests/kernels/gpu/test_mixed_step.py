"""A step of new tokens and chunks of prompts, by the kernels of a GPU."""

from __future__ import annotations

import pytest
import torch

from bireme.checkpoint.prepared import prepare_model
from bireme.kernels.attention import attention, attention_bias
from bireme.kernels.gpu.split_contexts import split_contexts
from bireme.kernels.query_tiles import Tiles
from bireme.kvcache.paged_cache import PagedCache
from bireme.models.attention import PagedAttention
from bireme.models.step import PagedStep
from bireme.parallel.cuts import HeadCut

BLOCK = 8


@pytest.mark.parametrize("counts", [[1, 1, 70, 33, 1], [1, 5], [40, 1, 1]])
def test_each_token_sees_its_own_context(counts: list[int], device: torch.device) -> None:
    config = prepare_model("demo").config
    cut = HeadCut(config.num_heads, config.num_kv_heads, config.head_dim, (0, config.num_heads))
    layer = PagedAttention(config, cut, 0)
    layer.place_on(device)
    starts = [90, 0, 17, 64, 30][: len(counts)]
    num_blocks = -(-max(starts) // BLOCK) + max(counts) // BLOCK + 1
    table = (1 + torch.randperm(len(counts) * num_blocks)).int().view(len(counts), -1).to(device)
    shape = 1 + table.numel(), BLOCK, cut.num_local_kv_heads, cut.head_dim
    cache = PagedCache(*shape, torch.float32, device)
    cache.keys.normal_()
    cache.values.normal_()
    slots = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device)
    positions = [
        torch.arange(first, first + count) for first, count in zip(starts, counts, strict=True)
    ]
    q = torch.randn(sum(counts), cut.num_local_heads, cut.head_dim, device=device)
    tiles = Tiles.of(starts, counts, device)
    at = torch.cat(positions).to(device)
    singles = at[: tiles.num_singles]
    splits = {None: split_contexts(singles, *cache.keys.shape[1:])} if len(singles) else {}
    step = PagedStep(slots, {None: table}, BLOCK, tiles, splits)
    found = layer.attend_paged(q, at, step, cache)
    for slot, rows in enumerate(found.split(counts)):
        at = positions[slot][None].to(device)
        stop = starts[slot] + counts[slot]
        places = (
            table[slot].long()[:, None] * BLOCK + torch.arange(BLOCK, device=device)
        ).flatten()
        keys, values = (
            x[places[:stop]][:, list(cut.head_map)].transpose(0, 1)[None]
            for x in (cache.keys, cache.values)
        )
        query = q[slots == slot].transpose(0, 1)[None]
        bias = attention_bias(at, (0, stop), None, None, q.dtype)
        expected = attention(query, keys, values, bias, layer.scale, None)[0]
        assert torch.allclose(rows, expected.transpose(0, 1).flatten(1), atol=2e-5), slot


def test_new_tokens_before_all_runs_are_in_no_tile() -> None:
    tiles = Tiles.of([90, 0, 17, 64], [1, 1, 70, 1], torch.device("cpu"))
    assert tiles.num_singles == 2
    assert tiles.on_device.tolist() == [[66, 81, 6, 17], [72, 64, 1, 65], [2, 17, 64, 17]]
