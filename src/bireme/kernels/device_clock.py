"""A CUDA device's times on CLOCK_MONOTONIC of the host."""

from __future__ import annotations

import time

import torch

from bireme.kernels.host_copies import download

_ANCHOR_EVERY_NS = 1_000_000_000  # a drift of 1 us was measured in a second
_ANCHOR_TRIES = 5


class DeviceClock:
    """A device's times on the host's clock, to within half of what an empty event takes to come back."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._stamp: torch.Tensor | None = None
        self._stamp_behind_ns = self._between_ns = 0
        self._anchor()

    def look_at_stamps(self, place: torch.Tensor) -> None:
        """From here on too; by stamps that are written to `place`, int64 [N, 2]."""
        from bireme.kernels.gpu.stamp import between_kernels_ns

        self._between_ns = between_kernels_ns(place)
        self._stamp = place[0, :1]
        self._anchor()

    def keep(self) -> None:
        """Looks at both clocks again, where the last look is long ago, on a stream of its own."""
        if time.monotonic_ns() - self._anchor_ns > _ANCHOR_EVERY_NS:
            self._anchor()

    def host_ns(self, event: torch.cuda.Event) -> int:
        """Of an event that is over."""
        elapsed_ms: float = self._event.elapsed_time(event)
        return self._anchor_ns + round(elapsed_ms * 1e6)

    def host_ns_of_stamps(self, begun: int, ended: int, *, is_own: bool) -> tuple[int, int]:
        """Of the device's own clock. `is_own`: a kernel stamped its own end; what it takes from there to the begin of
        the next is its time too."""
        rest_ns = self._between_ns if is_own else 0
        return self.host_ns_of_stamp(begun), self.host_ns_of_stamp(ended) + rest_ns

    def host_ns_of_stamp(self, stamp: int) -> int:
        return stamp + self._stamp_behind_ns

    def _anchor(self) -> None:
        self._event, self._anchor_ns = min(
            (self._look() for _ in range(_ANCHOR_TRIES)), key=lambda look: look[2]
        )[:2]
        if self._stamp is not None:
            # an event is never passed before the stamp that it follows
            self._stamp_behind_ns = min(
                self._look_at_stamp(self._stamp) for _ in range(_ANCHOR_TRIES)
            )

    def _look(self) -> tuple[torch.cuda.Event, int, int]:
        """An event, when it was on the host's clock, and how sure that is not (nanoseconds)."""
        event = torch.cuda.Event(enable_timing=True)
        start_ns = time.monotonic_ns()
        event.record(self._stream)
        event.synchronize()
        end_ns = time.monotonic_ns()
        return event, (start_ns + end_ns) // 2, end_ns - start_ns

    def _look_at_stamp(self, place: torch.Tensor) -> int:
        """How far the clock of stamps is behind the host's, or a little more (nanoseconds)."""
        from bireme.kernels.gpu.stamp import look_at_clock

        event, arrived = torch.cuda.Event(enable_timing=True), torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            look_at_clock(place)
            event.record()
            stamp = download(place)
            arrived.record()
        arrived.synchronize()
        return self.host_ns(event) - int(stamp)
