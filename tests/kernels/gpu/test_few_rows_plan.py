"""How products of a few rows are cut for the multiprocessors of a GPU."""

from __future__ import annotations

import math

import pytest
import torch

from bireme.kernels.gpu.few_rows import block_rows, block_sizes, num_parts


@pytest.mark.parametrize(
    ("num_rows", "parts"),
    [
        (1, {4096: 1, 12288: 1}),
        (8, {4096: 4, 5120: 4, 6144: 4, 8192: 1, 12288: 2, 32000: 1, 64: 4}),
        (32, {4096: 2, 5120: 3, 6144: 2, 8192: 1, 12288: 1, 2560: 3, 32000: 1, 64: 4}),
    ],
)
def test_products_come_in_parts_where_multiprocessors_are_to_have_more_work(
    num_rows: int, parts: dict[int, int]
) -> None:
    assert {size: num_parts(num_rows, size, 4096) for size in parts} == parts


@pytest.mark.parametrize("num_rows", [2, 16, 17, 64])
def test_no_part_of_a_product_is_without_inputs(num_rows: int) -> None:
    for inputs in range(1, 2000):
        parts = num_parts(num_rows, 64, inputs)
        share = 128 * math.ceil(math.ceil(inputs / parts) / 128)  # of a program, whole blocks
        assert (parts - 1) * share < inputs


# outputs and inputs of models of 7B and 70B over one and two GPUs, and whether they are a gate's
PRODUCTS = [
    (12288, 4096, False), (4096, 4096, False), (4096, 11008, False), (32000, 4096, False),
    (6144, 4096, False), (4096, 2048, False), (4096, 5504, False), (16000, 4096, False),
    (5120, 8192, False), (8192, 4096, False), (8192, 14336, False), (64128, 8192, False),
    (11008, 4096, True), (5504, 4096, True), (14336, 8192, True),
]  # fmt: skip


@pytest.mark.parametrize("num_rows", [2, 16, 32, 64])
def test_programs_of_a_multiprocessor_have_room(num_rows: int) -> None:
    """Each has, and of all but large products, and of gates with many inputs, all have it at once."""
    for outputs, inputs, is_gated in PRODUCTS:
        parts = 1 if is_gated else num_parts(num_rows, outputs, inputs)
        weight = torch.empty((1 + is_gated) * outputs, inputs, dtype=torch.bfloat16, device="meta")
        blocks = block_sizes(num_rows, weight, is_gated=is_gated, parts=parts)
        rows = (1 + is_gated) * blocks["BLOCK_N"] + block_rows(num_rows)
        num_bytes = blocks["num_stages"] * 2 * blocks["BLOCK_K"] * rows
        assert num_bytes <= 227 << 10, (outputs, inputs)
        at_once = math.ceil(math.ceil(outputs / blocks["BLOCK_N"]) * parts / 132)
        is_alone = at_once > 3 or blocks["BLOCK_N"] == 128 or (is_gated and inputs > 4096)
        assert is_alone or at_once * (num_bytes + 1024) <= 228 << 10, (outputs, inputs)
