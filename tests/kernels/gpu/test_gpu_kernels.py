"""Triton kernels against torch, in float32; on random inputs, with outputs that hold NaN before."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import product

import pytest
import torch
import triton

from bireme.engine.graphs import graph_sizes
from bireme.kernels import functional
from bireme.kernels.attention import attention, attention_bias
from bireme.kernels.gpu import chain, descriptors, few_rows
from bireme.kernels.gpu import prefill_attention as prefill_attention_module
from bireme.kernels.gpu.decode_attention import decode_attention
from bireme.kernels.gpu.few_rows import (
    MOST_ROWS,
    few_rows_gated,
    few_rows_linear,
    few_rows_parts,
    num_parts,
    suits,
)  # fmt: skip
from bireme.kernels.gpu.gated import silu_mul
from bireme.kernels.gpu.norm import add_rms_norm, rms_norm
from bireme.kernels.gpu.prefill_attention import prefill_attention
from bireme.kernels.gpu.rope_and_write import rope_and_write
from bireme.kernels.gpu.split_contexts import block_positions, even_splits, split_contexts
from bireme.kernels.query_tiles import Tiles, num_tiles, tiles_of

HAS_GPU = torch.cuda.is_available()
AS_MODELS_RUN = [torch.float16, *([torch.bfloat16] if HAS_GPU else [])]  # NumPy has no bfloat16
biases = pytest.mark.parametrize(
    ("window", "cap", "has_slopes"),
    [
        (None, None, False),
        (20, None, False),
        (None, 5.0, False),
        (None, None, True),
        (7, 3.0, True),
    ],
)
ROUNDED = {torch.float16: 5e-4, torch.bfloat16: 4e-3}  # of each element, relative


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> bool:
    """Relative to the whole; NaN is near nothing."""
    return bool((found.double() - expected.double()).norm() <= tolerance * expected.double().norm())


@pytest.mark.parametrize("size", [64, 80, 1000])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(size: int, offset: float, device: torch.device) -> None:
    x, delta = torch.randn(2, 7, size, device=device).unbind(0)
    weight = torch.randn(size, device=device)
    assert near(
        rms_norm(x, weight, 1e-5, offset), functional.rms_norm_reference(x, weight, 1e-5, offset)
    )
    total, normed = add_rms_norm(x, delta, weight, 1e-5, offset)
    assert torch.equal(total, x + delta)
    assert near(normed, functional.rms_norm_reference(x + delta, weight, 1e-5, offset))
    parts = torch.randn(3, 7, size, device=device)
    summed, normed = add_rms_norm(x, parts, weight, 1e-5, offset)
    assert near(summed, x + parts.sum(0))
    assert near(normed, functional.rms_norm_reference(summed, weight, 1e-5, offset))
    # a sum of parts is rounded before it is added, as a whole product is
    x, weight, whole = x.half(), weight.half(), (parts[0] + parts[1] + parts[2]).half()
    expected = add_rms_norm(x, whole, weight, 1e-5, offset)
    for one, other in zip(add_rms_norm(x, parts, weight, 1e-5, offset), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("columns", [3, 1024, 1100])
def test_gated_activation(columns: int, device: torch.device) -> None:
    h = torch.randn(5, 2 * columns, device=device)
    gate, up = h.chunk(2, dim=-1)
    assert near(silu_mul(h), functional.ACTIVATIONS["silu"](gate) * up)


@pytest.mark.parametrize("dtype", AS_MODELS_RUN)
@pytest.mark.parametrize("num_rows", [1, 2, 17, 40, 64])
@pytest.mark.parametrize(
    ("num_outputs", "num_inputs"),
    [
        (64, 512),
        (70, 600),
        (5, 40),
        *([(6000, 4096), (4096, 11008), (16896, 256)] if HAS_GPU else []),
    ],
)
def test_few_rows(
    num_rows: int, num_outputs: int, num_inputs: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = torch.randn(num_rows, num_inputs + 8, device=device).to(dtype)[:, :num_inputs]
    weight = (torch.randn(2 * num_outputs, num_inputs, device=device) / num_inputs**0.5).to(dtype)
    bias = torch.randn(2 * num_outputs, device=device).to(dtype)
    expected = torch.nn.functional.linear(x.double(), weight.double())
    assert near(few_rows_linear(x, weight), expected, ROUNDED[dtype])
    assert near(few_rows_linear(x, weight, bias), expected + bias, ROUNDED[dtype])
    gate, up = expected.chunk(2, dim=-1)
    activated = functional.ACTIVATIONS["silu"](gate) * up
    assert near(few_rows_gated(x, weight), activated, 3 * ROUNDED[dtype])
    parts = few_rows_parts(x, weight)
    assert parts.shape[:-2].numel() == num_parts(num_rows, 2 * num_outputs, num_inputs)
    assert near(functional.whole(parts, torch.float32), expected, ROUNDED[dtype])


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("num_inputs", [600, 512, 70])  # of which the last parts may have none
def test_parts_of_products(
    parts: int, num_inputs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_rows, "num_parts", lambda *_: parts)
    x = torch.randn(6, num_inputs, device=device).half()
    weight = (torch.randn(100, num_inputs, device=device) / num_inputs**0.5).half()
    found = few_rows_parts(x, weight)
    assert found.shape == (parts, 6, 100)
    assert near(found.sum(0), torch.nn.functional.linear(x.double(), weight.double()))


def test_few_rows_are_not_for_every_product(device: torch.device) -> None:
    x, weight = (torch.zeros(4, 32, dtype=torch.bfloat16, device=device) for _ in range(2))
    assert suits(x, weight)
    assert not suits(x.expand(MOST_ROWS, 4, 32).reshape(-1, 32), weight)
    many = x.expand(MOST_ROWS // 4, 4, 32).reshape(-1, 32)  # all multiprocessors are to have work
    assert suits(many, weight.expand(2112, 4, 32).reshape(-1, 32))
    assert not suits(many, weight.expand(1200, 4, 32).reshape(-1, 32))
    more = x.new_zeros(MOST_ROWS, 1024), weight.new_zeros(5120, 1024)
    assert suits(*more, in_parts=True)
    assert not suits(*more)
    assert suits(many, weight, is_gated=True)
    assert not suits(x.float(), weight.float())
    assert not suits(x, weight.t().contiguous().t())
    assert not suits(x.t(), weight)
    assert not suits(x[:0], weight)


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("head_dim", "half"), [(16, 8), (24, 6), (20, 0)])
def test_rope_and_write(has_norm: bool, head_dim: int, half: int, device: torch.device) -> None:
    num_tokens, num_heads, num_kv, num_written = 6, 3, 2, 5
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv) * head_dim, device=device)
    angles = torch.randn(num_tokens, half, device=device)
    rotation = (angles.cos(), angles.sin()) if half else None
    weights = torch.randn(2, head_dim, device=device).unbind(0)
    places = torch.randperm(40, device=device)[:num_written]
    keys, values = torch.full((2, 40, num_kv, head_dim), torch.nan, device=device).unbind(0)
    given = qkv.clone()
    norms = (*weights, 1e-6) if has_norm else None
    found = rope_and_write(qkv, num_heads, rotation, norms, places, keys, values)
    assert torch.equal(qkv, given)
    again = rope_and_write(given, num_heads, rotation, norms, places, keys, values, keeps_keys=True)
    assert torch.equal(again, found)
    queries, kept, own = given.unflatten(1, (-1, head_dim)).split([num_heads, num_kv, num_kv], 1)
    q, k, v = qkv.unflatten(1, (-1, head_dim)).split([num_heads, num_kv, num_kv], dim=1)
    if has_norm:
        q, k = (
            functional.rms_norm_reference(x, w, 1e-6) for x, w in zip((q, k), weights, strict=True)
        )
    if rotation is not None:
        q, k = (functional.apply_rope(x, *rotation) for x in (q, k))
    assert near(found, q)
    parts = torch.stack((qkv - 1, torch.full_like(qkv, 0.75), torch.full_like(qkv, 0.25)))
    cache = torch.full((2, 40, num_kv, head_dim), torch.nan, device=device).unbind(0)
    assert near(rope_and_write(parts, num_heads, rotation, norms, places, *cache), q)
    assert near(cache[0][places], k[:num_written])
    assert near(cache[1][places], v[:num_written])
    halves, given = (tuple(it.half() for it in them) for them in (cache, (rotation or ())))
    short = (*(w.half() for w in weights), 1e-6) if has_norm else None
    rounded = (parts[0] + parts[1] + parts[2]).half()
    for it in halves:
        it.fill_(torch.nan)
    of_parts = rope_and_write(parts, num_heads, given or None, short, places, *halves)
    written = [it[places].clone() for it in halves]
    assert torch.equal(
        of_parts, rope_and_write(rounded, num_heads, given or None, short, places, *halves)
    )
    assert all(
        torch.equal(*pair) for pair in zip(written, (it[places] for it in halves), strict=True)
    )
    assert near(keys[places], k[:num_written])
    assert near(values[places], v[:num_written])
    assert near(kept, k)
    assert torch.equal(queries, qkv.unflatten(1, (-1, head_dim))[:, :num_heads])
    assert torch.equal(own, v)
    assert int(keys.isnan().all(dim=(1, 2)).sum()) == 40 - num_written


def _paged(lengths: list[int], block_size: int, num_kv: int, head_dim: int, device: torch.device):  # type: ignore[no-untyped-def]
    """A cache whose blocks lie in any order, what no sequence holds being NaN, and its table."""
    counts = [-(-length // block_size) for length in lengths]
    blocks = torch.randperm(sum(counts) + 3)
    table = torch.zeros(len(lengths) + 1, max(counts) + 2, dtype=torch.int32)
    keys, values = torch.full((2, len(blocks) * block_size, num_kv, head_dim), torch.nan).unbind(0)
    places = []
    for slot, (length, own) in enumerate(zip(lengths, blocks.split([*counts, 3]), strict=False)):
        table[slot, : len(own)] = own
        at = (own[:, None] * block_size + torch.arange(block_size)).flatten()[:length]
        keys[at], values[at] = torch.randn(2, length, num_kv, head_dim)
        places.append(at)
    return keys.to(device), values.to(device), table.to(device), places


def _taken_out(  # type: ignore[no-untyped-def]
    keys: torch.Tensor,
    values: torch.Tensor,
    places,
    counts: list[int],
    num_heads: int,
    *,
    keep: bool = False,
) -> torch.Tensor:
    """The newest keys and values of sequences with several new tokens, in rows of a step [T, (H + 2 K) * D] that are
    NaN elsewhere, and from here on no longer in the cache."""
    num_kv, head_dim = keys.shape[1:]
    qkv = torch.full((sum(counts), num_heads + 2 * num_kv, head_dim), torch.nan).to(keys)
    row = 0
    for own, count in zip(places, counts, strict=True):
        if count > 1:
            new = own[len(own) - count :]
            qkv[row : row + count, num_heads:] = torch.cat((keys[new], values[new]), dim=1)
            if not keep:
                keys[new], values[new] = torch.nan, torch.nan
        row += count
    return qkv.flatten(1)


@biases
@pytest.mark.parametrize("head_map", [[0, 1], [0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 2]])
def test_decode_attention(
    head_map: list[int],
    window: int | None,
    cap: float | None,
    has_slopes: bool,
    device: torch.device,
) -> None:
    lengths, block_size, head_dim = [1, 70, 33, 200], 8, 24
    num_kv = head_map[-1] + 1
    keys, values, table, places = _paged(lengths, block_size, num_kv, head_dim, device)
    order = [2, 0, 3, 1]
    q = torch.randn(len(order), len(head_map), head_dim, device=device)
    slopes = torch.rand(len(head_map), device=device) if has_slopes else None
    starts = [head_map.index(kv) for kv in range(num_kv)] + [len(head_map)]
    positions = torch.tensor([lengths[slot] - 1 for slot in order], device=device)
    found = decode_attention(
        q, keys, values, table, block_size, torch.tensor(order, device=device), positions,
        split_contexts(positions, num_kv, head_dim, window),
        torch.tensor(starts, dtype=torch.int32, device=device),
        max(map(head_map.count, head_map)), 0.3, window, cap, slopes,
    )  # fmt: skip
    for row, slot in enumerate(order):
        k, v = (x[places[slot]][:, head_map].transpose(0, 1)[None] for x in (keys, values))
        at = torch.tensor([[lengths[slot] - 1]], device=device)
        bias = attention_bias(at, (0, lengths[slot]), window, slopes, q.dtype)
        expected = attention(q[row][None, :, None], k, v, bias, 0.3, cap)
        assert near(found[row], expected[0, :, 0], 3e-6), (row, slot)


@pytest.mark.parametrize("window", [None, 1200])
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(torch.float32, 16), *(product(AS_MODELS_RUN, (128, 256)) if HAS_GPU else [])],
)
def test_decode_attention_to_a_context_of_more_splits_than_are_joined_at_once(
    dtype: torch.dtype, head_dim: int, window: int | None, device: torch.device
) -> None:
    length, block_size, num_heads, scale = 1500, 16, 3, head_dim**-0.5
    keys, values, table, places = _paged([length], block_size, 1, head_dim, device)
    keys, values = keys.to(dtype), values.to(dtype)
    q = torch.randn(1, num_heads, head_dim, device=device).to(dtype)
    positions = torch.tensor([length - 1], device=device)
    splits = split_contexts(positions, 1, head_dim, window)
    assert splits.rows[0, 1] > 32
    found = decode_attention(
        q, keys, values, table, block_size, torch.tensor([0], device=device), positions, splits,
        torch.tensor([0, num_heads], dtype=torch.int32, device=device), num_heads, scale, window,
    )  # fmt: skip
    k, v = (
        x[places[0]].float().expand(-1, num_heads, -1).transpose(0, 1)[None] for x in (keys, values)
    )
    bias = attention_bias(positions[None], (0, length), window, None, torch.float32)
    expected = attention(q[0].float()[None, :, None], k, v, bias, scale, None)
    assert near(found[0], expected[0, :, 0], 2 * ROUNDED.get(dtype, 1.5e-6))


@pytest.mark.parametrize("window", [None, 450])
@pytest.mark.parametrize("longest", [7, 700])
def test_decode_attention_of_so_many_that_few_contexts_are_split(
    longest: int, window: int | None, device: torch.device
) -> None:
    """Launched twice by the same splits, as the layers of a step do."""
    lengths, block_size, head_dim, head_map = [3] * 33, 8, 16, [0, 0, 1, 2, 3]
    lengths[20] = longest
    cache = _paged(lengths, block_size, 4, head_dim, device)
    keys, values, table, places = cache
    q = torch.randn(len(lengths), len(head_map), head_dim, device=device)
    positions = torch.tensor(lengths, device=device) - 1
    splits = split_contexts(positions, 4, head_dim, window)
    assert splits.join_themselves
    assert (splits.rows[20, 1] > 1) == (longest > 7)
    starts = torch.tensor([0, 2, 3, 4, 5], dtype=torch.int32, device=device)
    for _ in range(2):
        found = decode_attention(
            q, keys, values, table, block_size, torch.arange(len(lengths), device=device),
            positions, splits, starts, 2, 0.3, window,
        )  # fmt: skip
        for row in (0, 20, 32):
            k, v = (x[places[row]][:, head_map].transpose(0, 1)[None] for x in (keys, values))
            at = positions[row][None, None]
            bias = attention_bias(at, (0, lengths[row]), window, None, q.dtype)
            expected = attention(q[row][None, :, None], k, v, bias, 0.3, None)
            assert near(found[row], expected[0, :, 0], 3e-6), row


@pytest.mark.parametrize(("num_sequences", "window"), [(3, 640), (33, None)])
def test_even_splits_give_the_same_bits_whatever_the_other_contexts(
    num_sequences: int, window: int | None, device: torch.device
) -> None:
    block_size, num_kv, head_dim = 8, 8, 16
    lengths = [700, *[300 if row < 8 else 1 for row in range(1, num_sequences)]]
    keys, values, table, _ = _paged(lengths, block_size, num_kv, head_dim, device)
    q = torch.randn(num_sequences, num_kv, head_dim, device=device)
    splits = even_splits(num_sequences, num_kv, head_dim, device)
    assert splits.join_themselves == (num_sequences == 33)

    def found(others: float) -> torch.Tensor:
        """Of the first sequence, where contexts of others are so much of their lengths."""
        at = [max(0, int(length * others) - 1) for length in lengths]
        return decode_attention(
            q, keys, values, table, block_size, torch.arange(num_sequences, device=device),
            torch.tensor([lengths[0] - 1, *at[1:]], device=device), splits,
            torch.arange(num_kv + 1, dtype=torch.int32, device=device), 1, 0.3, window,
        )[0]  # fmt: skip

    assert torch.equal(found(1.0), found(0.0))


@pytest.mark.parametrize("dtype", AS_MODELS_RUN)
@pytest.mark.parametrize("head_dim", [64, 96, 160] + [80, 128, 256] * HAS_GPU)
@pytest.mark.parametrize("block_size", [16, 64])
def test_attention_as_models_run(
    head_dim: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    head_map, lengths, new = [0, 0, 1, 1], [344, 97, 65], [200, 1, 65]
    keys, values, table, places = _paged(lengths, block_size, 2, head_dim, device)
    keys, values = keys.to(dtype), values.to(dtype)
    q = torch.randn(sum(new), 4, head_dim, device=device).to(dtype)
    starts = [length - count for length, count in zip(lengths, new, strict=True)]
    slots = torch.arange(3, device=device).repeat_interleave(torch.tensor(new, device=device))
    paged = keys, values, table, block_size
    prefilled = prefill_attention(
        q, *paged, slots, Tiles.of(starts, new, device),
        torch.tensor(head_map, dtype=torch.int32, device=device), head_dim**-0.5,
    )  # fmt: skip
    last = torch.tensor(new).cumsum(0).to(device) - 1
    positions = torch.tensor(lengths, device=device) - 1
    decoded = decode_attention(
        q[last], *paged, torch.arange(3, device=device), positions,
        split_contexts(positions, 2, head_dim),
        torch.tensor([0, 2, 4], dtype=torch.int32, device=device), 2, head_dim**-0.5,
    )  # fmt: skip
    cached = keys.clone(), values.clone()
    qkv = _taken_out(*cached, places, new, len(head_map))
    from_rows = prefill_attention(
        q, *cached, *paged[2:], slots, Tiles.of(starts, new, device),
        torch.tensor(head_map, dtype=torch.int32, device=device), head_dim**-0.5, qkv=qkv,
    )  # fmt: skip
    assert near(from_rows, prefilled, 2 * ROUNDED[dtype])
    for slot, (rows, of) in enumerate(zip(prefilled.split(new), q.split(new), strict=True)):
        k, v = (x[places[slot]][:, head_map].float().transpose(0, 1)[None] for x in (keys, values))
        at = torch.arange(starts[slot], lengths[slot], device=device)[None]
        bias = attention_bias(at, (0, lengths[slot]), None, None, torch.float32)
        wanted = attention(of.float().transpose(0, 1)[None], k, v, bias, head_dim**-0.5, None)
        expected = wanted[0].transpose(0, 1)
        assert near(rows, expected, 2 * ROUNDED[dtype]), slot
        assert near(decoded[slot], expected[-1], 2 * ROUNDED[dtype]), slot


@pytest.mark.skipif(not HAS_GPU, reason="takes 9 GB of a GPU")
def test_caches_of_more_elements_than_32_bits_count(device: torch.device) -> None:
    lengths, new, block_size, head_dim = [344, 97], [200, 1], 16, 128
    keys, values, table, _ = _paged(lengths, block_size, 2, head_dim, device)
    near_by = keys.bfloat16(), values.bfloat16()
    shift = 2**31 // (2 * head_dim)  # tokens
    far = [torch.empty(shift + len(x), 2, head_dim, dtype=x.dtype, device=device) for x in near_by]
    for x, of in zip(far, near_by, strict=True):
        x[shift:] = of
    q = torch.randn(sum(new), 4, head_dim, device=device).bfloat16()
    qkv = torch.randn(8, 8 * head_dim, device=device).bfloat16()
    starts = [length - count for length, count in zip(lengths, new, strict=True)]
    head_map = torch.tensor([0, 0, 1, 1], dtype=torch.int32, device=device)
    slots = torch.tensor([0] * 200 + [1], device=device)
    positions = torch.tensor(lengths, device=device) - 1

    def results(cache: Sequence[torch.Tensor], before: int) -> list[torch.Tensor]:
        own = table + before // block_size
        found = [
            prefill_attention(
                q, *cache, own, block_size, slots, Tiles.of(starts, new, device), head_map, 0.1
            ),
            decode_attention(
                q[-2:], *cache, own, block_size, torch.arange(2, device=device), positions,
                split_contexts(positions, 2, head_dim), head_map.new_tensor([0, 2, 4]), 2, 0.1,
            ),
        ]  # fmt: skip
        places = torch.arange(8, device=device) + before
        found.append(rope_and_write(qkv, 4, None, None, places, *cache))
        return [*found, *(x[places] for x in cache)]

    for one, other in zip(results(near_by, 0), results(far, shift), strict=True):
        assert torch.equal(one, other)


def num_splits(lengths: Sequence[int], num_kv: int, device: torch.device) -> list[int]:
    """Of each context."""
    found = split_contexts(torch.tensor(lengths, device=device) - 1, num_kv, 128)
    assert not found.arrivals.any()
    items = found.items.tolist()
    for row, (first, count) in enumerate(found.rows.tolist()):
        assert items[first : first + count] == [[row, split, count] for split in range(count)]
    counts = [count for _, count in found.rows.tolist()]
    assert not any(count for _, _, count in items[sum(counts) :])
    assert len({row for row, _, _ in items[: sum(counts)]}) == len(lengths)
    return counts


@pytest.mark.parametrize("others", [2, 63])
@pytest.mark.parametrize("num_kv", [1, 8])
def test_no_split_is_empty(num_kv: int, others: int, device: torch.device) -> None:
    block = block_positions(1 + others, num_kv, 128)
    for length in (384, 1000, 2592, 5000, 16_160, 20_000):
        count, *rest = num_splits([length] + [1] * others, num_kv, device)
        blocks = -(-length // block)
        assert (count - 1) * -(-blocks // count) < blocks, (length, count)
        assert rest == [1] * others


def test_splits_fill_a_gpu_however_uneven_contexts_are(device: torch.device) -> None:
    assert num_splits([192], 32, device) == [6]
    assert num_splits([4096], 1, device) == [64]
    assert num_splits([4096], 8, device) == [32]
    assert num_splits([1024] * 64, 32, device) == [1] * 64
    assert num_splits([1024] * 64, 4, device) == [2] * 64
    assert num_splits([256] * 64, 4, device) == [1] * 64  # joining takes longer than that saves
    assert num_splits([1024] * 8, 8, device) == [4] * 8
    assert num_splits([192] * 63 + [100_000], 32, device) == [1] * 63 + [14]
    assert num_splits([1000, 1200, 700, 1600], 64, device) == [2, 2, 1, 3]
    assert num_splits([1000, 2400, 700, 1600], 64, device) == [1, 3, 1, 2]
    assert num_splits([1] * 512 + [30_000] * 12, 32, device)[-12:] == [1] * 12


@pytest.mark.parametrize("num_kv", [1, 8, 32])
@pytest.mark.parametrize(("count", "num_rows"), [(1, 2), (33, 48), (40, 64)])
def test_empty_rows_of_a_graph_change_no_splits(
    count: int, num_rows: int, num_kv: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(count)
    lengths = (1 + torch.rand(count, generator=generator) ** 4 * 2000).long().tolist()
    padded = lengths + [1] * (num_rows - count)
    assert num_splits(padded, num_kv, device)[:count] == num_splits(lengths, num_kv, device)


@pytest.mark.parametrize("num_kv", [1, 4, 32, 300])
def test_all_splits_have_room(num_kv: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(num_kv)
    for count in (1, 2, 3, 8, 33, 100):
        for longest in (1, 500, 131_072):
            lengths = 1 + (torch.rand(count, generator=generator) ** 4 * longest).long()
            num_splits(lengths.tolist(), num_kv, device)


def test_blocks_of_contexts() -> None:
    steps = [(1, 32), (1, 1), (64, 32), (8, 8), (64, 4)]  # sequences and KV heads
    assert [block_positions(*step, 128) for step in steps] == [32, 32, 64, 32, 32]
    assert block_positions(64, 32, 256) == 32


@pytest.mark.parametrize("num_programs", [528, 5])  # of all tiles, or of several each
@biases
def test_prefill_attention(
    window: int | None,
    cap: float | None,
    has_slopes: bool,
    num_programs: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefill_attention_module, "_PROGRAMS", num_programs)
    head_map, block_size, head_dim = [0, 1, 1, 1, 2], 8, 40  # in parts of 32 and 16
    lengths, counts = [150, 70, 33, 1], [140, 1, 33, 1]  # contexts, and how much of them is new
    keys, values, table, places = _paged(lengths, block_size, 3, head_dim, device)
    q = torch.randn(sum(counts), len(head_map), head_dim, device=device)
    slopes = torch.rand(len(head_map), device=device) if has_slopes else None
    starts = [length - count for length, count in zip(lengths, counts, strict=True)]
    slots = torch.arange(4, device=device).repeat_interleave(torch.tensor(counts, device=device))
    found = prefill_attention(
        q, keys, values, table, block_size, slots, Tiles.of(starts, counts, device),
        torch.tensor(head_map, dtype=torch.int32, device=device), 0.3, window, cap, slopes,
    )  # fmt: skip
    for slot, (rows, new) in enumerate(zip(found.split(counts), q.split(counts), strict=True)):
        k, v = (x[places[slot]][:, head_map].transpose(0, 1)[None] for x in (keys, values))
        at = torch.arange(starts[slot], lengths[slot], device=device)[None]
        bias = attention_bias(at, (0, lengths[slot]), window, slopes, q.dtype)
        expected = attention(new.transpose(0, 1)[None], k, v, bias, 0.3, cap)
        assert near(rows, expected[0].transpose(0, 1), 3e-6), slot
    # the same in a place that is kept for steps, with rows of no run behind
    room = torch.zeros(num_tiles(counts) + 3, 4, dtype=torch.int32)
    room[:-3] = torch.from_numpy(tiles_of(starts, counts))
    tiles = Tiles(room.to(device), has_other_rows=True)
    padded = torch.cat((q, torch.full_like(q[:2], torch.nan)))
    again = prefill_attention(
        padded, keys, values, table, block_size, torch.cat((slots, slots[:2])), tiles,
        torch.tensor(head_map, dtype=torch.int32, device=device), 0.3, window, cap, slopes,
    )  # fmt: skip
    assert torch.equal(again, torch.cat((found, torch.zeros_like(q[:2]))))
    # keys and values of the runs read from rows of the step, as if nobody had written them
    qkv = _taken_out(keys, values, places, counts, len(head_map), keep=window is not None)
    from_rows = prefill_attention(
        q, keys, values, table, block_size, slots, Tiles.of(starts, counts, device),
        torch.tensor(head_map, dtype=torch.int32, device=device), 0.3, window, cap, slopes, qkv,
    )  # fmt: skip
    assert near(from_rows, found, 3e-6)


@pytest.mark.parametrize("dtype", AS_MODELS_RUN)
@pytest.mark.parametrize(
    ("head_dim", "parts"),
    [(64, [64]), (72, [64, 16]), (12, [])]
    + [(8, [16]), (80, [64, 16]), (96, [64, 32]), (112, [128]), (128, [128])] * HAS_GPU,
)
@pytest.mark.parametrize(("cap", "has_slopes"), [(None, False), (5.0, False), (None, True)])
def test_keys_and_values_that_a_gpu_fetches_by_itself(
    cap: float | None,
    has_slopes: bool,
    head_dim: int,
    parts: list[int],
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of runs beside others, before rows of no run that hold no numbers; the cache has none of the runs' own. Of heads
    of 12 it fetches none: 24 bytes are no multiple of 16."""
    described: list[list[int]] = []

    def noted(x: torch.Tensor, block: list[int]) -> object:
        described.append(block)
        return descriptors.described(x, block)

    monkeypatch.setattr(prefill_attention_module, "described", noted)
    head_map, lengths, counts = [0, 0, 1, 1], [177, 1, 73], [140, 1, 73]
    keys, values, table, places = _paged(lengths, 16, 2, head_dim, device)
    keys, values = keys.to(dtype), values.to(dtype)
    cached = keys.clone(), values.clone()
    qkv = _taken_out(*cached, places, counts, len(head_map))
    qkv = torch.cat((qkv, torch.full_like(qkv[:5], torch.nan)))
    q = torch.randn(len(qkv), 4, head_dim, device=device).to(dtype)
    starts = [length - count for length, count in zip(lengths, counts, strict=True)]
    slots = torch.arange(3, device=device).repeat_interleave(torch.tensor(counts, device=device))
    room = torch.zeros(num_tiles(counts) + 2, 4, dtype=torch.int32)
    room[:-2] = torch.from_numpy(tiles_of(starts, counts))
    slopes = torch.rand(4, device=device) if has_slopes else None
    found = prefill_attention(
        q, *cached, table, 16, torch.cat((slots, slots[:5])),
        Tiles(room.to(device), has_other_rows=True),
        torch.tensor(head_map, dtype=torch.int32, device=device), 0.1, None, cap, slopes, qkv,
    )  # fmt: skip
    assert described == [[1, 64, part] for part in parts]  # of one head, 64 rows
    assert not found[-5:].any()
    for slot, (rows, of) in enumerate(
        zip(found[:-5].split(counts), q[:-5].split(counts), strict=True)
    ):
        k, v = (x[places[slot]][:, head_map].float().transpose(0, 1)[None] for x in (keys, values))
        at = torch.arange(starts[slot], lengths[slot], device=device)[None]
        bias = attention_bias(at, (0, lengths[slot]), None, slopes, torch.float32)
        expected = attention(of.float().transpose(0, 1)[None], k, v, bias, 0.1, cap)
        assert near(rows, expected[0].transpose(0, 1), 2 * ROUNDED[dtype]), slot


KERNELS_OF_POSITIONS = """
import importlib, pkgutil, triton
import bireme.kernels.gpu as folder

for found in pkgutil.iter_modules(folder.__path__):
    module = importlib.import_module(f"{folder.__name__}.{found.name}")
    for name, it in vars(module).items():
        if isinstance(it, triton.JITFunction) and it.__module__ == module.__name__:
            for param in it.params:
                if param.name == "positions" and name.endswith("_kernel"):
                    print(name, param.do_not_specialize_on_alignment)
"""


def test_kernels_are_the_same_wherever_positions_lie() -> None:
    """A graph of an odd number of rows has them at an odd multiple of 8 bytes, and a step beside it elsewhere."""
    environment = {key: it for key, it in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", KERNELS_OF_POSITIONS],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    told = dict(line.split() for line in done.stdout.splitlines())
    assert {"split_contexts_kernel", "decode_attention_kernel"} <= told.keys()
    assert set(told.values()) == {"True"}, told


@pytest.mark.parametrize("most", [1, 2, 20, 33, 40, 64, 100, 256, 300])
@pytest.mark.parametrize("num_kv_heads", [1, 4, 8, 32])
def test_graphs_of_decode_steps_have_compiled_what_any_number_of_sequences_needs(
    most: int, num_kv_heads: int
) -> None:
    """A last layer of the sampled rows of prompts compiles nothing amid a request."""

    def kernels(count: int) -> set[tuple[object, ...]]:
        is_chained, rows = count <= chain.MOST_ROWS, few_rows.block_rows(count)
        splits = even_splits(count, num_kv_heads, 128, torch.device("cpu"))
        found: set[tuple[object, ...]] = {
            ("norm", is_chained, 1 if count > few_rows.MOST_ROWS else num_parts(count, 4096, 4096)),
            ("attention", splits.even, splits.block, is_chained),
            ("splits", triton.next_power_of_2(count), splits.even, splits.block),
        }  # fmt: skip
        if count == 1:
            return found | {("one row",)}
        if count > few_rows.MOST_ROWS:
            return found
        return found | {("product", rows, few_rows.held_inputs(count), is_chained)}

    compiled = set[tuple[object, ...]]().union(*map(kernels, graph_sizes(most)))
    for count in range(1, most + 1):
        assert kernels(count) <= compiled, count
