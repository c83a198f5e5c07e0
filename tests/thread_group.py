"""A tensor group of threads in one process, for tests of vocabulary-parallel code."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from bireme.parallel.mesh import TensorGroup

Result = TypeVar("Result")


class ThreadGroup(TensorGroup):
    """One member's side of the group."""

    def __init__(
        self, rank: int, shared: list[torch.Tensor | None], barrier: threading.Barrier
    ) -> None:
        self._rank, self._shared, self._barrier = rank, shared, barrier

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._shared[self._rank] = x.clone()
        self._barrier.wait()
        everyone = [part for part in self._shared if part is not None]
        self._barrier.wait()
        return everyone

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(torch.stack(self._exchange(x)).sum(dim=0))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(x))


def run_group(size: int, work: Callable[[int, ThreadGroup], Result]) -> list[Result]:
    """`work(rank, group)` on every member; the results in rank order."""
    shared: list[torch.Tensor | None] = [None] * size
    barrier = threading.Barrier(size, timeout=30)
    with ThreadPoolExecutor(size) as threads:
        futures = [
            threads.submit(work, rank, ThreadGroup(rank, shared, barrier)) for rank in range(size)
        ]
        return [future.result() for future in futures]
