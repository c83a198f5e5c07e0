"""Sums over ranks that write into one another's memory: processes that share theirs, without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import multiprocessing
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpreterOptions, interpreter_builder

from bireme.kernels import functional
from bireme.kernels.gpu.peer_sum import Inboxes, peer_sum, peer_sum_add_norm

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="two GPUs do it in tests/gpu/test_peer_group_on_gpu.py"
)
ROWS, NUM_WORDS, EPS = 5, 24, 1e-5
SHAPES = [(5, 20), (2, 24), (5, 20), (1, 6), (3, 24), (5, 20)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def memory_of(size: int, num_words: int = NUM_WORDS) -> torch.Tensor:
    num_bytes = Inboxes.num_bytes(ROWS, size, num_words)
    return torch.zeros(size, num_bytes // 8, dtype=torch.int64).share_memory_()


def inboxes_of(
    memory: torch.Tensor, rank: int, most_polls: int, num_words: int = NUM_WORDS
) -> Inboxes:
    addresses = torch.tensor([part.data_ptr() for part in memory])
    return Inboxes(addresses, torch.zeros(ROWS, dtype=torch.int32), rank, num_words, most_polls)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """To within two roundings; the interpreter's bfloat16 is cut off and not rounded."""
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[found.dtype]
    return torch.allclose(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


def check(
    own: Inboxes, size: int, shape: tuple[int, int], dtype: torch.dtype, offset: float
) -> None:
    """A sum, and one with a residual and a norm."""
    generator = torch.Generator().manual_seed(sum(shape))
    addends, others = torch.randn(2, size, *shape, generator=generator).to(dtype)
    x, weights = torch.randn(2, *shape, generator=generator).to(dtype)
    addend = addends[own.rank].clone()
    assert peer_sum(own, addend) is addend
    assert close(addend, addends.float().sum(0).to(dtype))
    weight = weights[0].clone()
    total, normed = peer_sum_add_norm(own, others[own.rank].clone(), x, weight, EPS, offset)
    expected = x + others.float().sum(0).to(dtype)
    assert close(total, expected)
    assert close(normed, functional.rms_norm_reference(expected, weight, EPS, offset))
    if dtype != torch.float32:
        parts = torch.randn(3, *shape, generator=generator)
        parts[0] += others[own.rank].float() - parts.sum(0)
        total, normed = peer_sum_add_norm(own, parts, x, weight, EPS, offset)
        assert close(total, expected)
        assert close(normed, functional.rms_norm_reference(expected, weight, EPS, offset))


def work(rank: int, memory: torch.Tensor) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is no number
    own = inboxes_of(memory, rank, 10**6)
    for index, dtype in enumerate(DTYPES):
        for shape in SHAPES:
            check(own, len(memory), shape, dtype, float(index % 2))
    assert int(own.numbers[0]) == (2 + 3 + 3) * len(SHAPES)


@pytest.mark.parametrize("size", [2, 3])
def test_sums_of_ranks_in_processes_of_their_own(size: int) -> None:
    """Of changing numbers of rows: what is left of an earlier sum is in no later one."""
    multiprocessing.spawn(work, (memory_of(size),), nprocs=size)


def test_a_rank_that_does_not_come_is_waited_for_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    asserting = InterpreterOptions(debug=True, sanitize_overflow=False)
    monkeypatch.setattr(interpreter_builder, "options", asserting)
    memory = memory_of(2)
    with pytest.raises(InterpreterError, match="did not come in time"):
        peer_sum(inboxes_of(memory, 0, 3), torch.ones(1, 4))


def test_what_can_be_summed() -> None:
    inboxes = inboxes_of(memory_of(2, 4), 0, 3, 4)
    assert inboxes.suits(torch.zeros(5, 4))
    assert inboxes.suits(torch.zeros(5, 8, dtype=torch.bfloat16))
    assert not inboxes.suits(torch.zeros(6, 4))
    assert not inboxes.suits(torch.zeros(5, 5))
    assert not inboxes.suits(torch.zeros(4))
    assert not inboxes.suits(torch.zeros(2, 3, dtype=torch.bfloat16))
    assert not inboxes.suits(torch.zeros(4, 5).t())
    assert not inboxes.suits(torch.zeros(2, 2, dtype=torch.int64))
