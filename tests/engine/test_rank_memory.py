"""What a rank holds: pages that are there, what steps took beyond rest, and how the kinds add up."""

from __future__ import annotations

import mmap
import os

import pytest
import torch

from bireme.bench.memory_kinds import rank_memory
from bireme.engine.messages import RankUsage
from bireme.engine.rank_memory import reset_peak, resident_bytes, usage
from bireme.engine.rank_stats import RankBytes, RankStats
from bireme.kernels.linear import can_be_packed, pack

CPU = torch.device("cpu")
MIB = 1 << 20


def test_of_a_tensor_what_was_written_is_resident() -> None:
    x = torch.empty(64 * MIB, dtype=torch.uint8)
    before = resident_bytes(x)
    x[: 16 * MIB] = 1
    assert resident_bytes(x) - before == pytest.approx(16 * MIB, abs=4 * MIB)
    x[:] = 1
    assert resident_bytes(x) == 64 * MIB


def test_of_packed_weights_too() -> None:
    weight = torch.ones(1024, 1024)
    assert resident_bytes(weight) == 4 * MIB
    if can_be_packed(weight):
        assert resident_bytes(pack(weight)) == pytest.approx(4 * MIB, rel=0.1)


def test_what_is_held_for_a_moment_is_seen() -> None:
    reset_peak(CPU)
    x = torch.ones(48 * MIB, dtype=torch.uint8)
    del x
    found = usage(CPU, [], [], 0)
    if found.beyond_rest_bytes is None:
        pytest.skip("this host does not tell of a process's peak")
    assert found.beyond_rest_bytes == pytest.approx(48 * MIB, rel=0.2)
    reset_peak(CPU)
    again = usage(CPU, [], [], 0).beyond_rest_bytes
    assert again is not None
    assert again < 8 * MIB


def test_pages_that_stay_are_no_peak() -> None:
    """A cache fills while steps run."""
    cache = torch.empty(32 * MIB, dtype=torch.uint8)
    reset_peak(CPU)
    cache[:] = 1
    found = usage(CPU, [], [cache], 0)
    assert found.cache_resident_bytes == 32 * MIB
    assert (found.beyond_rest_bytes or 0) < 8 * MIB


def test_shared_memory_is_counted_by_its_name() -> None:
    fd = os.memfd_create("bireme-world")
    os.ftruncate(fd, 8 * MIB)
    with mmap.mmap(fd, 8 * MIB) as shared:
        shared[:] = b"x" * 8 * MIB
        assert usage(CPU, [], [], 0).communication_bytes == 8 * MIB
    os.close(fd)
    assert usage(CPU, [], [], 0).communication_bytes == 0


STATS = RankStats(0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, RankBytes(100, 400, 70))
AT_REST = RankUsage(900, 800, 50, 0, 5, 90, 30, 40, 20, None, None, None)


def test_kinds_add_up_on_a_cpu() -> None:
    after = RankUsage(900, 800, 50, 0, 8, 90, 30, 40, 20, None, None, None)
    found = rank_memory(STATS, AT_REST, after, after)
    assert (found.rank, found.weight_bytes, found.cache_bytes) == (3, 100, 400)
    assert found.other_bytes == 800 - 90 - 30 - 40
    assert found.total_bytes == 800 + 20, "what it has, and what steps took beyond"
    assert (found.num_major_faults, found.num_alloc_retries) == (3, None)
    assert "mincore" in found.how["weights"]


def test_kinds_add_up_to_what_a_gpu_has_in_use() -> None:
    before = RankUsage(900, 800, 0, 0, 5, 100, 400, 40, 20, 1000, 600, 1)
    after = RankUsage(900, 800, 0, 0, 5, 100, 400, 40, 20, 1000, 600, 3)
    found = rank_memory(STATS, before, after, after)
    assert found.total_bytes == 1000
    assert found.num_alloc_retries == 2
    assert "memory_allocated" in found.how["activations"]
