"""Sums of many rows over ranks that write into one another's memory: processes that share theirs, without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import multiprocessing
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpreterOptions, interpreter_builder

from bireme.kernels import functional
from bireme.kernels.gpu import sharded_sum
from bireme.kernels.gpu.sharded_sum import Addends, Rooms

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="two GPUs do it in tests/gpu/test_peer_group_on_gpu.py"
)
MOST_ROWS, MOST_COLUMNS, EPS = 7, 24, 1e-5
SHAPES = [(7, 20), (2, 24), (1, 6), (7, 20), (3, 24)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NUM_PROGRAMS = 2
SUM_BYTES = 4 * MOST_ROWS * MOST_COLUMNS
PART_BYTES = 4 * (MOST_ROWS // 2 + 1) * MOST_COLUMNS


@dataclass(frozen=True)
class Shared:
    """Of all ranks, as uint8: what each has of its own, with addends behind it, or, where it is there, of two ranks the
    part of what each adds that is for the first one, and behind it that for the second."""

    own: torch.Tensor
    slots: torch.Tensor | None = None

    @classmethod
    def of(cls, size: int, *, is_pushed: bool) -> Shared:
        num_bytes = Rooms.num_bytes(size, SUM_BYTES) + (0 if is_pushed else SUM_BYTES)
        own = torch.zeros(size, num_bytes, dtype=torch.uint8).share_memory_()
        if not is_pushed:
            return cls(own)
        return cls(own, torch.zeros(size, 2 * PART_BYTES, dtype=torch.uint8).share_memory_())

    def addends(self, rank: int) -> Addends:
        if self.slots is None:
            behind = Rooms.num_bytes(len(self.own), SUM_BYTES)
            places = self.own[:, behind:]
            return Addends(addresses(places), places[rank])
        shares = self.slots[:, rank * PART_BYTES :]
        return Addends(addresses(shares), self.slots[rank], boundary=PART_BYTES)

    def rooms(self, rank: int, most_polls: int) -> Rooms:
        meetings = torch.zeros(sharded_sum.NUM_PROGRAMS, dtype=torch.int32)
        added = self.addends(rank)
        return Rooms(
            addresses(self.own), meetings, self.own[rank], added, rank, SUM_BYTES, most_polls
        )


def addresses(parts: torch.Tensor) -> torch.Tensor:
    return torch.tensor([part.data_ptr() for part in parts])


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


def work(rank: int, memory: Shared) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is no number
    sharded_sum.NUM_PROGRAMS = NUM_PROGRAMS  # each is interpreted
    own = memory.rooms(rank, 10**6)
    for index, dtype in enumerate(DTYPES):
        for shape in SHAPES:
            check(own, len(memory.own), shape, dtype, float(index % 2))
    assert own.meetings.tolist() == [2 * 3 * len(DTYPES) * len(SHAPES)] * NUM_PROGRAMS


@pytest.mark.parametrize(("size", "is_pushed"), [(2, False), (3, False), (2, True)])
def test_sums_of_ranks_in_processes_of_their_own(size: int, is_pushed: bool) -> None:
    """Of changing numbers of rows, one of them fewer than ranks."""
    multiprocessing.spawn(work, (Shared.of(size, is_pushed=is_pushed),), nprocs=size)


def test_a_rank_that_does_not_come_is_waited_for_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    asserting = InterpreterOptions(debug=True, sanitize_overflow=False)
    monkeypatch.setattr(interpreter_builder, "options", asserting)
    x = torch.ones(4, 4)
    with pytest.raises(InterpreterError, match="did not come to a sum in time"):
        sharded_sum.sharded_sum_add(Shared.of(2, is_pushed=False).rooms(0, 3), x.clone(), x)


@pytest.mark.parametrize("is_pushed", [False, True])
def test_what_there_is_room_for(is_pushed: bool) -> None:
    own = Shared.of(2, is_pushed=is_pushed).rooms(1, 3)
    assert own.addends(MOST_ROWS, MOST_COLUMNS, torch.float32) is not None
    assert own.addends(2 * MOST_ROWS, MOST_COLUMNS, torch.bfloat16) is not None
    assert own.addends(MOST_ROWS, MOST_COLUMNS + 1, torch.float32) is None
    more = replace(own, sum_bytes=16)
    assert more.addends(2, 2, torch.float32) is not None
    assert more.addends(2, 3, torch.float32) is None


def test_rows_of_a_window_lie_with_the_rank_that_adds_them_up() -> None:
    memory = Shared.of(2, is_pushed=True)
    assert memory.slots is not None
    for num_rows in range(1, MOST_ROWS + 1):
        memory.slots.zero_()
        place = memory.rooms(1, 3).addends(num_rows, MOST_COLUMNS, torch.float32)
        assert place is not None
        place.fill_(1.0)
        first, second = memory.slots[1].view(torch.float32).view(2, -1).count_nonzero(1).tolist()
        assert first == num_rows // 2 * MOST_COLUMNS
        assert second == (num_rows - num_rows // 2) * MOST_COLUMNS
