"""The kernels in C against torch in float64, on fresh random inputs; where there is no compiler they are skipped."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F

from bireme.kernels.choice import suits_c, suits_c_attention
from bireme.kernels.cpu import ops
from bireme.kernels.cpu.library import KINDS
from bireme.kernels.functional import apply_rope, softcap

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}  # of the largest
dtypes = pytest.mark.parametrize("dtype", KINDS, ids=str)


def close(found: torch.Tensor, wanted: torch.Tensor, num_roundings: int = 1) -> bool:
    error = (found.double() - wanted).abs().max()
    return bool(error <= num_roundings * TOLERANCE[found.dtype] * wanted.abs().max())


def exact_norm(x: torch.Tensor, weight: torch.Tensor, offset: float) -> torch.Tensor:
    y = x.double()
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * (weight.double() + offset)


@dtypes
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("num_rows", "size"), [(1, 64), (7, 100), (33, 1024)])
def test_norms(num_rows: int, size: int, offset: float, dtype: torch.dtype) -> None:
    x, delta = torch.randn(2, num_rows, size).mul(3).to(dtype)
    weight = torch.randn(size).to(dtype)
    assert close(
        ops.rms_norm(x, weight, 1e-5, offset), exact_norm(x, weight, offset), num_roundings=2
    )
    total, normed = ops.add_rms_norm(x, delta, weight, 1e-5, offset)
    assert torch.equal(total, x + delta)
    assert close(normed, exact_norm(total, weight, offset), num_roundings=2)


@dtypes
@pytest.mark.parametrize(("num_rows", "size"), [(1, 16), (5, 99), (32, 1408)])
def test_gates(num_rows: int, size: int, dtype: torch.dtype) -> None:
    h = torch.randn(num_rows, 2 * size).mul(20).to(dtype)  # far into where exponentials overflow
    h[0, 0], h[-1, 1] = 300.0, -300.0
    gate, up = h.double().chunk(2, dim=-1)
    assert close(ops.silu_mul(h), F.silu(gate) * up)


@dtypes
@pytest.mark.parametrize("half", [0, 8, 16, 32])
@pytest.mark.parametrize("num_written", [0, 3, 5])
def test_rotation_and_writing(num_written: int, half: int, dtype: torch.dtype) -> None:
    heads, num_kv, size, num_rows = 6, 2, 64, 5
    qkv = torch.randn(num_rows, (heads + 2 * num_kv) * size).to(dtype)
    angles = torch.randn(num_rows, half)
    rotation = (angles.cos().to(dtype), angles.sin().to(dtype)) if half else None
    keys, values = torch.full((2, 40, num_kv, size), float("nan")).to(dtype)
    places = torch.randperm(40)[:num_written]
    q = ops.rope_and_write(qkv, heads, rotation, places, keys, values)
    parts = qkv.double().view(num_rows, -1, size)
    turned = parts[:, : heads + num_kv]
    if rotation is not None:
        turned = apply_rope(turned, *(x.double() for x in rotation))
    assert close(q, turned[:, :heads])
    written = torch.zeros(40, dtype=torch.bool).index_fill(0, places, True)
    assert keys[~written].isnan().all()
    assert values[~written].isnan().all()
    if num_written:
        assert close(keys[places], turned[:num_written, heads:])
        assert torch.equal(values[places].double(), parts[:num_written, heads + num_kv :])


def exact_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, distance: torch.Tensor,
    cap: float | None, slopes: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """q [H, D], keys and values [C, H, D] -> [H, D]"""
    scores = torch.einsum("hd,chd->hc", q, keys) * 0.11
    scores = scores if cap is None else softcap(scores, cap)
    if slopes is not None:
        scores = scores - slopes.double().unsqueeze(1) * distance
    return torch.einsum("hc,chd->hd", torch.softmax(scores, dim=-1), values)


@dtypes
@pytest.mark.parametrize(
    ("window", "cap", "has_slopes"),
    [(None, None, False), (5, None, False), (40, 5.0, False), (None, None, True)],
)
@pytest.mark.parametrize(
    ("head_map", "size"), [((0, 0, 1, 1), 64), ((0, 1, 1, 1, 2), 80), ((0,), 256)]
)
def test_attention_of_one_new_token(
    head_map: tuple[int, ...], size: int, window: int | None, cap: float | None, has_slopes: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Contexts of unequal lengths, in a cache that is full of NaN where nothing of theirs lies."""
    lengths, num_kv = [1, 7, 32, 33, 100], max(head_map) + 1
    places = torch.randperm(5 * 101).view(5, 101)
    keys, values = torch.full((2, 5 * 101, num_kv, size), float("nan")).to(dtype)
    q = torch.randn(5, len(head_map), size).to(dtype)
    slopes = torch.rand(len(head_map)) if has_slopes else None
    wanted = torch.zeros(q.shape, dtype=torch.float64)
    for row, length in enumerate(lengths):
        first = 0 if window is None else max(0, length - window)
        seen = places[row, first:length]
        keys[seen], values[seen] = torch.randn(2, len(seen), num_kv, size).to(dtype)
        k, v = (x[seen].double()[:, list(head_map)] for x in (keys, values))
        distance = torch.arange(len(seen) - 1, -1, -1)
        wanted[row] = exact_attention(q[row].double(), k, v, distance, cap, slopes)
    positions, owners = torch.tensor(lengths) - 1, torch.tensor(head_map, dtype=torch.int32)
    given = keys, values, places, positions, owners, 0.11, window, cap, slopes
    found = ops.decode_attention(q, *given)
    assert close(found, wanted, num_roundings=2)
    alone = ops.decode_attention(q[3:4], keys, values, places[3:4], positions[3:4], *given[4:])
    assert torch.equal(alone[0], found[3])


def test_few_rows_of_what_they_know_or_ranks_of_one_thread_take_them() -> None:
    few, many = torch.zeros(8, 1024), torch.zeros(64, 1024)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert (suits_c(few), suits_c(many), suits_c(few.half())) == (True, False, False)
        assert [suits_c_attention(few, num_keys) for num_keys in (1 << 20, 1 << 21)] == [
            True,
            False,
        ]
        assert not suits_c_attention(few[:, :20], 1)
        torch.set_num_threads(1)
        assert suits_c(many)
        assert suits_c_attention(many, 1 << 21)
    finally:
        torch.set_num_threads(threads)
