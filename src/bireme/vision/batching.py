"""Images wait here, and become micro-batches: first come, first served. No torch, no clock of its own."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Share(Generic[R]):
    """Images [first, stop) of a request, which go in one micro-batch."""

    request: R
    first: int
    stop: int

    @property
    def num_images(self) -> int:
        return self.stop - self.first


class BatchQueue(Generic[R]):
    """A micro-batch is of at most `max_batch_size` images. It is there as soon as no more fits, or its
    first has waited `max_delay_s` for others. Only a request that is larger than one is cut."""

    def __init__(self, max_batch_size: int, max_delay_s: float) -> None:
        self.max_batch_size, self._max_delay_s = max_batch_size, max_delay_s
        self._waiting: deque[tuple[float, Share[R]]] = deque()  # when it is due, and what
        self.num_images = 0

    def put(self, request: R, num_images: int, arrival_s: float) -> None:
        due_s, most = arrival_s + self._max_delay_s, self.max_batch_size
        for first in range(0, num_images, most):
            share = Share(request, first, min(first + most, num_images))
            self._waiting.append((due_s, share))
        self.num_images += num_images

    def drop(self, request: R) -> None:
        """Takes out what still waits of it."""
        kept = [entry for entry in self._waiting if entry[1].request != request]
        self._waiting = deque(kept)
        self.num_images = sum(share.num_images for _, share in kept)

    @property
    def due_s(self) -> float | None:
        """By when there is a micro-batch, come what may; None where nothing waits."""
        return self._waiting[0][0] if self._waiting else None

    def take(self, now_s: float) -> list[Share[R]]:
        """The next micro-batch; none where it is better to wait."""
        found, size = [], 0
        for _, share in self._waiting:
            if size + share.num_images > self.max_batch_size:
                break
            found.append(share)
            size += share.num_images
        is_full = len(found) < len(self._waiting) or size == self.max_batch_size
        if not found or not (is_full or now_s >= self._waiting[0][0]):
            return []
        for _ in found:
            self._waiting.popleft()
        self.num_images -= size
        return found
