"""Packed weights multiply like plain ones."""

from __future__ import annotations

import pytest
import torch

from bireme.kernels.linear import can_be_packed, linear, pack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 32), (37, 50), (1, 3), (500, 1024)])
@pytest.mark.parametrize("num_rows", [1, 3, 33])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_packed_weight_multiplies_like_the_plain_one(
    dtype: torch.dtype, shape: tuple[int, int], num_rows: int, has_bias: bool
) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = (torch.randn(shape, generator=draw) / shape[1] ** 0.5).to(dtype)
    if not can_be_packed(weight):
        pytest.skip("oneDNN does not multiply by this type here")
    bias = torch.randn(shape[0], generator=draw).to(dtype) if has_bias else None
    x = torch.randn(num_rows, 2 * shape[1], generator=draw).to(dtype)[:, ::2]  # not contiguous
    packed = pack(weight)
    torch.testing.assert_close(linear(x, packed, bias), linear(x, weight, bias))
    assert torch.equal(packed.to_dense(), weight)
    assert packed.shape == weight.shape
    assert packed.dtype == dtype
