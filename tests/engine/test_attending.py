"""A step's attention by the kernels in C is the one by torch, sequences with one new token and prompts together."""

from __future__ import annotations

import shutil

import pytest
import torch

from bireme.checkpoint.prepared import prepare_model
from bireme.kvcache.paged_cache import PagedCache
from bireme.models import attention
from bireme.models.attention import PagedAttention
from bireme.models.step import SequenceGroup, StepContext
from bireme.parallel.cuts import HeadCut

BLOCK, CONTEXT = 16, 48


def group(cache: PagedCache, rows: list[list[int]], last: list[int]) -> SequenceGroup:
    """Sequences whose new tokens end at positions `last`, each with blocks of its own."""
    positions = torch.tensor(
        [
            [end - len(row) + 1 + at for at in range(len(row))]
            for row, end in zip(rows, last, strict=True)
        ]
    )
    blocks = torch.randperm(len(cache.keys) // BLOCK - 1)[: len(rows) * CONTEXT // BLOCK] + 1
    places = (blocks.view(len(rows), -1, 1) * BLOCK + torch.arange(BLOCK)).flatten(1)
    num_context = max(last) + 1
    return SequenceGroup(
        torch.tensor(rows), positions, {None: places[:, :num_context]}, num_context,
        int(positions.min()), CONTEXT,
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [(0, 4), (1, 4)])
def test_a_mixed_step(
    queries: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = prepare_model("demo").config
    cut = HeadCut(config.num_heads, config.num_kv_heads, config.head_dim, queries)
    layer = PagedAttention(config, cut, 0)
    layer.place_on(torch.device("cpu"))
    shape = 40, BLOCK, cut.num_local_kv_heads, cut.head_dim
    cache = PagedCache(*shape, dtype, torch.device("cpu"))
    cache.keys.normal_()
    cache.values.normal_()
    groups = [group(cache, [[0], [3], [4]], [0, 20, 47]), group(cache, [[1, 2]], [9])]
    step = StepContext(torch.arange(5), {}, groups, {0: cache})
    q = torch.randn(5, cut.num_local_heads, cut.head_dim).to(dtype)
    by_c = layer(q, step)
    monkeypatch.setattr(attention, "suits_c_attention", lambda *_: False)
    by_torch = layer(q, step)
    assert not torch.equal(by_c, by_torch)  # they are two
    assert torch.allclose(by_c, by_torch, atol=1e-5 if dtype == torch.float32 else 3e-2)
