"""Without a GPU the kernels run in Triton's interpreter; without Triton these tests are skipped."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch


class _NeedsTriton(pytest.Module):
    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        if torch.cuda.is_available():
            pytest.importorskip("triton")
        else:
            pytest.importorskip("triton", "3.9", "Triton 3.9 interprets loops with NumPy 2.4")
        return super().collect()


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    return _NeedsTriton.from_parent(parent, path=module_path)
