"""Sums over ranks that write into one another's memory: here all ranks are one process, and take turns."""

from __future__ import annotations

import pytest
import torch
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpreterOptions, interpreter_builder

from bireme.kernels import functional
from bireme.kernels.gpu import peer_sum
from bireme.kernels.gpu.peer_sum import Inboxes

ROWS = 5


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Ranks:
    """`size` ranks with rows of up to `num_words` words."""

    def __init__(self, size: int, num_words: int, device: torch.device) -> None:
        num_bytes = Inboxes.num_bytes(ROWS, size, num_words)
        self.memory = torch.zeros(size, num_bytes // 8, dtype=torch.int64, device=device)
        addresses = torch.tensor([part.data_ptr() for part in self.memory], device=device)
        self.inboxes = [
            Inboxes(
                addresses, torch.zeros(ROWS, dtype=torch.int32, device=device), rank, num_words, 3
            )
            for rank in range(size)
        ]

    def sum(self, addends: torch.Tensor) -> list[torch.Tensor]:
        given = list(addends.clone())
        for sends in (True, False):
            for inboxes, addend in zip(self.inboxes, given, strict=True):
                peer_sum._run(
                    inboxes, addend, None, None, addend, None, sends=sends, receives=not sends
                )
        return given

    def sum_add_norm(
        self, addends: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, offset: float
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        made = [
            (torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)) for _ in self.inboxes
        ]
        for sends in (True, False):
            for inboxes, addend, (total, normed) in zip(self.inboxes, addends, made, strict=True):
                peer_sum._run(
                    inboxes, addend, x, weight, total, normed, 1e-5, offset,
                    sends=sends, receives=not sends,
                )  # fmt: skip
        return made


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """To within two roundings; the interpreter's bfloat16 is cut off and not rounded."""
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[found.dtype]
    return torch.allclose(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3])
def test_sums_in_turn(size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Of changing numbers of rows: what is left of an earlier sum is in no later one."""
    ranks = Ranks(size, 24, device)
    for num_rows, width in [(5, 20), (2, 24), (5, 20), (1, 6), (3, 24), (5, 20)]:
        addends = torch.randn(size, num_rows, width, device=device).to(dtype)
        found = ranks.sum(addends)
        assert close(found[0], addends.float().sum(0).to(dtype))
        for one in found:
            assert torch.equal(one, found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_sum_add_norm(dtype: torch.dtype, offset: float, device: torch.device) -> None:
    ranks = Ranks(2, 64, device)
    for num_rows in (1, 4):
        addends = torch.randn(2, num_rows, 60, device=device).to(dtype)
        x = torch.randn(num_rows, 60, device=device).to(dtype)
        weight = torch.randn(60, device=device).to(dtype)
        found = ranks.sum_add_norm(addends, x, weight, offset)
        total = x + addends.float().sum(0).to(dtype)
        normed = functional.rms_norm_reference(total, weight, 1e-5, offset)
        for one, other in found:
            assert close(one, total)
            assert close(other, normed)


def test_a_rank_that_does_not_come_is_waited_for_no_longer(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cuda":
        pytest.skip("the assertion ends this process's work with the GPU")
    asserting = InterpreterOptions(debug=True, sanitize_overflow=False)
    monkeypatch.setattr(interpreter_builder, "options", asserting)
    ranks = Ranks(2, 4, device)
    x = torch.ones(1, 4)
    with pytest.raises(InterpreterError, match="did not come in time"):
        peer_sum.peer_sum(ranks.inboxes[0], x)


def test_what_can_be_summed(device: torch.device) -> None:
    inboxes = Ranks(2, 4, device).inboxes[0]
    assert inboxes.suits(torch.zeros(5, 4))
    assert inboxes.suits(torch.zeros(5, 8, dtype=torch.bfloat16))
    assert not inboxes.suits(torch.zeros(6, 4))
    assert not inboxes.suits(torch.zeros(5, 5))
    assert not inboxes.suits(torch.zeros(4))
    assert not inboxes.suits(torch.zeros(2, 3, dtype=torch.bfloat16))
    assert not inboxes.suits(torch.zeros(4, 5).t())
    assert not inboxes.suits(torch.zeros(2, 2, dtype=torch.int64))
