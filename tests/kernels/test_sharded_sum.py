"""Sums of many rows over ranks that write into one another's memory: processes that share theirs, without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import multiprocessing
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpreterOptions, interpreter_builder

from bireme.kernels import functional
from bireme.kernels.gpu import sharded_sum
from bireme.kernels.gpu.sharded_sum import Rooms

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="two GPUs do it in tests/gpu/test_peer_group_on_gpu.py"
)
MOST_ROWS, MOST_COLUMNS, EPS = 7, 24, 1e-5
SHAPES = [(7, 20), (2, 24), (1, 6), (7, 20), (3, 24)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NUM_PROGRAMS = 2


def rooms(memory: torch.Tensor, rank: int, most_polls: int) -> Rooms:
    return Rooms(
        torch.tensor([part.data_ptr() for part in memory]),
        torch.zeros(sharded_sum.NUM_PROGRAMS, dtype=torch.int32),
        memory[rank],
        rank,
        4 * MOST_ROWS * MOST_COLUMNS,
        most_polls,
    )


def memory_of(size: int) -> torch.Tensor:
    num_bytes = Rooms.num_bytes(size, 4 * MOST_ROWS * MOST_COLUMNS)
    return torch.zeros(size, num_bytes, dtype=torch.uint8).share_memory_()


def close(found: torch.Tensor, expected: torch.Tensor, num_sums: int) -> bool:
    """To within two roundings a sum; the interpreter's bfloat16 is cut off and not rounded."""
    rounding = {torch.float32: 5e-7, torch.float16: 1e-3, torch.bfloat16: 1e-2}[found.dtype]
    tolerance = 2 * num_sums * rounding
    return torch.allclose(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


def check(own: Rooms, size: int, shape: tuple[int, int], dtype: torch.dtype, offset: float) -> None:
    """Two norms that follow one another, and the whole sum behind them."""
    generator = torch.Generator().manual_seed(sum(shape))
    addends = torch.randn(3, size, *shape, generator=generator).to(dtype)
    expected, weight = torch.randn(2, *shape, generator=generator).to(dtype)
    held, weight = expected.clone(), weight[0].clone()
    share = slice(shape[0] * own.rank // size, shape[0] * (own.rank + 1) // size)
    for num_sums, parts in enumerate(addends[:2], start=1):
        results = own.results(*shape, dtype)
        assert results is not None
        held, normed = sharded_sum.sharded_sum_add_norm(
            own, parts[own.rank].clone(), held, weight, EPS, offset
        )
        assert normed.data_ptr() == results.data_ptr()
        expected = expected + parts.float().sum(0).to(dtype)
        assert close(held[share], expected[share], num_sums)
        assert close(normed, functional.rms_norm_reference(expected, weight, EPS, offset), num_sums)
    place = own.addends(*shape, dtype)
    assert place is not None
    place.copy_(addends[2][own.rank])  # as a product writes it
    total = sharded_sum.sharded_sum_add(own, place, held)
    assert close(total, expected + addends[2].float().sum(0).to(dtype), 3)


def work(rank: int, memory: torch.Tensor) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is no number
    sharded_sum.NUM_PROGRAMS = NUM_PROGRAMS  # each is interpreted
    own = rooms(memory, rank, 10**6)
    for index, dtype in enumerate(DTYPES):
        for shape in SHAPES:
            check(own, len(memory), shape, dtype, float(index % 2))
    assert own.meetings.tolist() == [2 * 3 * len(DTYPES) * len(SHAPES)] * NUM_PROGRAMS


@pytest.mark.parametrize("size", [2, 3])
def test_sums_of_ranks_in_processes_of_their_own(size: int) -> None:
    """Of changing numbers of rows, one of them fewer than ranks."""
    multiprocessing.spawn(work, (memory_of(size),), nprocs=size)


def test_a_rank_that_does_not_come_is_waited_for_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    asserting = InterpreterOptions(debug=True, sanitize_overflow=False)
    monkeypatch.setattr(interpreter_builder, "options", asserting)
    x = torch.ones(4, 4)
    with pytest.raises(InterpreterError, match="did not come to a sum in time"):
        sharded_sum.sharded_sum_add(rooms(memory_of(2), 0, 3), x.clone(), x)


def test_what_there_is_room_for() -> None:
    own = rooms(memory_of(2), 1, 3)
    assert own.addends(MOST_ROWS, MOST_COLUMNS, torch.float32) is not None
    assert own.addends(2 * MOST_ROWS, MOST_COLUMNS, torch.bfloat16) is not None
    assert own.addends(MOST_ROWS, MOST_COLUMNS + 1, torch.float32) is None
    more = replace(own, sum_bytes=16)
    assert more.addends(2, 2, torch.float32) is not None
    assert more.addends(2, 3, torch.float32) is None
