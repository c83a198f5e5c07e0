"""Sums and messages through shared memory, between real processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import shm_rank
import torch
from hypothesis import given
from hypothesis import strategies as st

from bireme.parallel.segment_plan import CHUNK_BYTES, SegmentPlan, create_segment
from bireme.parallel.shm import Segment, _sum_into, join_group
from bireme.parallel.shm_helper import load_helper
from bireme.trace import SpanRing

WIDTHS = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


KINDS = pytest.mark.parametrize("is_compiled", [True, False], ids=["compiled", "from Python"])


def plan_of(widths: tuple[int, ...], *, is_compiled: bool) -> SegmentPlan:
    if is_compiled and load_helper() is None:
        pytest.skip("no C compiler here")
    return SegmentPlan(widths=widths, hidden_bytes=4096, sampled_bytes=64, is_compiled=is_compiled)


def run_ranks(what: str, plan: SegmentPlan) -> list[str]:
    """What each rank printed."""
    fd, path = create_segment(plan)
    given = [json.dumps(msgspec.to_builtins(plan)), path]
    ranks = [
        subprocess.Popen(
            [sys.executable, shm_rank.__file__, what, str(rank), *given],
            stdout=subprocess.PIPE, text=True,
        )
        for rank in range(sum(plan.widths))
    ]  # fmt: skip
    printed = [rank.communicate(timeout=120)[0] for rank in ranks]
    os.close(fd)
    return printed


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_has_the_same_bits_of_a_sum_in_rank_order(size: int) -> None:
    plan = plan_of((size,), is_compiled=False)
    first, *others = (json.loads(text) for text in run_ranks("sums", plan))
    assert all(other == first for other in others)
    expected = []
    for dtype in shm_rank.DTYPES:
        for count in shm_rank.SIZES:
            parts = [shm_rank.addend(rank, count, dtype) for rank in range(size)]
            wide = torch.float32 if dtype.itemsize == 2 else dtype
            total = parts[0].to(wide)
            for part in parts[1:]:
                total = total + part.to(wide)
            expected += [shm_rank.bits(total.to(dtype)), shm_rank.bits(torch.stack(parts))]
    assert first == expected
    compiled = run_ranks("sums", plan_of((size,), is_compiled=True))
    assert [json.loads(text) for text in compiled] == [first] * size


@KINDS
def test_a_sum_whose_peer_died_ends_at_the_deadline_and_names_it(is_compiled: bool) -> None:
    said = run_ranks("late", plan_of((2,), is_compiled=is_compiled))
    assert said[1] == "rank 0 did not come within 2 s\n"


@KINDS
def test_more_ranks_than_cores_get_on(is_compiled: bool) -> None:
    size = len(os.sched_getaffinity(0)) + 2
    said = run_ranks("rounds", plan_of((size,), is_compiled=is_compiled))
    assert said == [f"{sum(range(size))}.0\n"] * size


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
def test_the_helper_is_made_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_helper() is not None
    monkeypatch.setenv("PATH", "")  # no compiler any more
    assert load_helper() is not None
    (made,) = (tmp_path / "bireme").iterdir()
    assert made.parent.stat().st_mode & 0o777 == 0o700


def test_without_a_compiler_or_where_others_can_write_there_is_no_helper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    assert load_helper() is None
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "bireme").chmod(0o777)
    assert load_helper() is None
    monkeypatch.undo()
    monkeypatch.setenv("BIREME_COMPILED_HELPER", "0")
    assert load_helper() is None


BITS = st.integers(0, 0xFFFF)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@given(rows=st.lists(st.tuples(BITS, BITS, BITS), min_size=1, max_size=40))
def test_any_bits_are_rounded_as_torch_rounds_them(
    dtype: torch.dtype, rows: list[tuple[int, int, int]]
) -> None:
    """Not a number stays one; of which kind is left open."""
    parts = torch.tensor(list(zip(*rows, strict=True))).to(torch.uint16).view(dtype)
    for size in (2, 3):
        found = sum_alone(parts[:size])
        expected = torch.empty_like(parts[0])
        _sum_into(expected, list(parts[:size]))
        assert torch.equal(found.isnan(), expected.isnan())
        bits = [x.view(torch.int16)[~expected.isnan()].tolist() for x in (found, expected)]
        assert bits[0] == bits[1]


def sum_alone(parts: torch.Tensor) -> torch.Tensor:
    """A sum in one process: the others' parts lie in their buffers before it begins."""
    size, plan = len(parts), plan_of((len(parts),), is_compiled=True)
    fd, path = create_segment(plan)
    segment = Segment(path, plan, 1.0)
    os.close(fd)
    for rank in range(1, size):
        at = plan.buffer_at(rank, 1)
        segment.bytes[at : at + parts[rank].nbytes] = parts[rank].view(torch.uint8)
        segment.counter(rank, rank).raise_to(1)
    return join_group(segment, 0, SpanRing.create(4)).all_reduce(parts[0].clone())


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
