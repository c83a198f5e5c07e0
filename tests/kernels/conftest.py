"""Without a GPU the kernels run in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    pytest.importorskip("triton", minversion="3.9", reason="interprets loops with NumPy 2.4")
else:
    pytest.importorskip("triton")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """What a kernel leaves unwritten is no number: torch fills new memory with NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
