"""Sums and messages through shared memory, between real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import shm_rank
import torch
from hypothesis import given
from hypothesis import strategies as st

from bireme.parallel.shm import CHUNK_BYTES, SegmentPlan, create_segment

WIDTHS = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


def run_ranks(what: str, widths: tuple[int, ...]) -> list[str]:
    """What each rank printed."""
    fd, path = create_segment(SegmentPlan(widths=widths, hidden_bytes=4096, sampled_bytes=64))
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    ranks = [
        subprocess.Popen(
            [sys.executable, shm_rank.__file__, what, str(rank), json.dumps(widths), path],
            stdout=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(sum(widths))
    ]  # fmt: skip
    printed = [rank.communicate(timeout=120)[0] for rank in ranks]
    os.close(fd)
    return printed


@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_rank_has_the_same_bits_of_a_sum_in_rank_order(size: int) -> None:
    first, *others = (json.loads(text) for text in run_ranks("sums", (size,)))
    assert all(other == first for other in others)
    expected = []
    for dtype in shm_rank.DTYPES:
        for count in shm_rank.SIZES:
            parts = [shm_rank.addend(rank, count, dtype) for rank in range(size)]
            wide = torch.float32 if dtype == torch.bfloat16 else dtype
            total = parts[0].to(wide)
            for part in parts[1:]:
                total = total + part.to(wide)
            expected += [str(total.to(dtype).double().sum().item())]
            expected += [str(torch.stack(parts).double().sum().item())]
    assert [value for at, value in enumerate(first) if at % 4 < 2] == expected


def test_a_sum_whose_peer_died_ends_at_the_deadline_and_names_it() -> None:
    assert run_ranks("late", (2,))[1] == "rank 0 did not come within 2 s\n"


@given(WIDTHS, st.integers(1, 10**6), st.integers(1, 10**4))
def test_nothing_in_a_segment_overlaps(
    widths: tuple[int, ...], hidden_bytes: int, sampled_bytes: int
) -> None:
    plan = SegmentPlan(widths=widths, hidden_bytes=hidden_bytes, sampled_bytes=sampled_bytes)
    areas = [(0, plan.num_counters * 64)]
    for rank in range(sum(widths)):
        for parity in (0, 1):
            start = plan.buffer_at(rank, parity)
            areas.append((start, start + CHUNK_BYTES))
    counters = list(range(sum(widths)))
    for _, ring in plan.rings():
        assert ring.slot_bytes >= 32 + min(hidden_bytes, sampled_bytes)
        areas += [(ring.slot_at(n), ring.slot_at(n) + ring.slot_bytes) for n in range(ring.depth)]
        counters += [ring.counter, ring.counter + 1]
    areas.sort()
    assert all(first[1] <= second[0] for first, second in pairwise(areas))
    assert areas[-1][1] <= plan.num_bytes
    assert sorted(counters) == list(range(plan.num_counters))
    assert all(start % 64 == 0 for start, _ in areas)


def test_the_segment_leaves_nothing_behind(tmp_path: Path) -> None:
    fd, path = create_segment(SegmentPlan(widths=(2,), hidden_bytes=1, sampled_bytes=1))
    assert Path(path).exists()
    os.close(fd)
    assert not Path(path).exists()
