"""Spans by the clock of a CUDA device: from when its stream comes to where one begins to where one ends.

The host issues work ahead of the device, so its own clock tells nothing of it. CUDA events mark both
ends; their times are mapped to CLOCK_MONOTONIC of the host, and the records are written once the device
has passed them. Each span is an NVTX range of the same name as well.

Two events and their times cost the host about 20 us, so that the many collectives of a step are marked in
one step of `SAMPLED_EVERY` alone; the others are counted. In CUDA graphs they are stamped by kernels (`gpu/stamp.py`),
their own where they can: events would keep those from being chained.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from bireme.kernels.host_copies import download
from bireme.trace import COLLECTIVES, SpanKind, SpanRing

_ANCHOR_EVERY_NS = 1_000_000_000  # a drift of 1 us was measured in a second
_ANCHOR_TRIES = 5
_MOST_STAMPED = 4096  # sums of a graph
_NUM_LOOKED = 32  # kernels, to see what lies between two
SAMPLED_EVERY = 16


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
        return begun + self._stamp_behind_ns, ended + self._stamp_behind_ns + rest_ns

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


class _Events(NamedTuple):
    """Around a span."""

    start: torch.cuda.Event
    end: torch.cuda.Event

    def host_ns(self, clock: DeviceClock) -> tuple[int, int]:
        return clock.host_ns(self.start), clock.host_ns(self.end)


class _Copied:
    """Stamps int64 [N, 2] on their way from the device."""

    def __init__(self, stamps: torch.Tensor) -> None:
        self._copy = download(stamps)

    @cached_property
    def numbers(self) -> list[list[int]]:
        """Once they are there."""
        found: list[list[int]] = self._copy.tolist()
        return found


class _Stamps(NamedTuple):
    """A row of what is copied; `is_own`: of a kernel's own."""

    copied: _Copied
    row: int
    is_own: bool

    def host_ns(self, clock: DeviceClock) -> tuple[int, int]:
        begun, ended = self.copied.numbers[self.row]
        return clock.host_ns_of_stamps(begun, ended, is_own=self.is_own)


@dataclass(slots=True)
class _Marked:
    """A span that the device has yet to pass; it has, and tells when, once `over` is."""

    kind: SpanKind
    outer: int
    num_bytes: int
    step_id: int
    incarnation: int
    over: torch.cuda.Event
    times: _Events | _Stamps


@dataclass
class CapturedSpans:
    """The collectives inside a CUDA graph, in the order of their stamps, with their bytes, and whether a kernel stamps
    its own. Without `notes_others` the others have none."""

    notes_others: bool
    counts: list[tuple[SpanKind, int, bool]] = field(default_factory=list)

    @property
    def num_others(self) -> int:
        return sum(not is_own for *_, is_own in self.counts)


class DeviceSpans:
    """Stands before a rank's ring. What a rank is in the middle of is told as the host comes to it."""

    def __init__(self, ring: SpanRing, device: torch.device) -> None:
        self._ring, self._device = ring, device
        self._clock = DeviceClock(device)
        self._pending: deque[_Marked] = deque()
        self._aside: deque[_Marked] = deque()  # of other streams, which are over in another order
        self._free: list[torch.cuda.Event] = []
        self._num_steps = 0
        self._captured: CapturedSpans | None = None
        self._has_stamps = False
        # of the graph that was replayed last; of the clock; of kernels that are in no graph, which nobody reads
        self._stamps = torch.zeros(_MOST_STAMPED, 2, dtype=torch.int64, device=device)
        self._looked = torch.zeros(_NUM_LOOKED, 2, dtype=torch.int64, device=device)
        self.unread = torch.zeros(2, dtype=torch.int64, device=device)

    def set_step(self, step_id: int, incarnation: int) -> None:
        self._write_passed()
        self._ring.set_step(step_id, incarnation)
        self._num_steps += 1

    def span(
        self, kind: SpanKind, num_bytes: int = 0, step_id: int | None = None
    ) -> AbstractContextManager[None]:
        if self._captured is not None:
            return self._within_graph(kind, num_bytes)
        if kind in COLLECTIVES and not self.is_sampled_step:
            return self._counted(kind, num_bytes)
        return _DeviceSpan(self, kind, num_bytes, step_id, is_aside=False)

    @property
    def is_sampled_step(self) -> bool:
        """Whether this step's collectives are marked, and not only counted."""
        return self._num_steps % SAMPLED_EVERY == 1

    @contextmanager
    def stamped(self, kind: SpanKind, num_bytes: int) -> Iterator[torch.Tensor]:
        """A span of one kernel that stamps its own times into int64 [2]."""
        if self._captured is not None:
            yield self._next_stamps(self._captured, kind, num_bytes, is_own=True)
            return
        with self.span(kind, num_bytes):
            yield self.unread

    @contextmanager
    def _within_graph(self, kind: SpanKind, num_bytes: int) -> Iterator[None]:
        if kind not in COLLECTIVES or self._captured is None:
            yield
            return
        from bireme.kernels.gpu.stamp import note_time

        is_noted = self._captured.notes_others
        stamps = self._next_stamps(self._captured, kind, num_bytes, is_own=False)
        if is_noted:
            note_time(stamps)
        yield
        if is_noted:
            note_time(stamps[1:])

    def _next_stamps(
        self, captured: CapturedSpans, kind: SpanKind, num_bytes: int, *, is_own: bool
    ) -> torch.Tensor:
        row = len(captured.counts)
        assert row < _MOST_STAMPED, f"a graph has more than {_MOST_STAMPED} collectives"
        captured.counts.append((kind, num_bytes, is_own))
        return self._stamps[row]

    @contextmanager
    def capturing(self, *, notes_others: bool = True) -> Iterator[CapturedSpans]:
        """What runs within is captured in a CUDA graph: its spans are told by `replayed`."""
        from bireme.kernels.gpu.stamp import note_time

        if not self._has_stamps:
            self._has_stamps = True
            self._clock.look_at_stamps(self._looked)
            note_time(self.unread)  # it is compiled before it is captured
        self._captured = CapturedSpans(notes_others)
        try:
            yield self._captured
        finally:
            self._captured = None

    def replayed(self, captured: CapturedSpans) -> None:
        """Of a graph that was launched just now."""
        if not captured.counts:
            return
        if not self.is_sampled_step:
            for kind, num_bytes, _ in captured.counts:
                self._ring.count(kind, num_bytes)
            return
        step_id, incarnation = self._ring.step
        copied = _Copied(self._stamps[: len(captured.counts)])
        over = torch.cuda.Event()
        over.record()
        for row, (kind, num_bytes, is_own) in enumerate(captured.counts):
            outer = self._ring.begin(kind)
            self._ring.end(outer)
            times = _Stamps(copied, row, is_own)
            self._pending.append(_Marked(kind, outer, num_bytes, step_id, incarnation, over, times))

    def aside(self, kind: SpanKind, num_bytes: int) -> _DeviceSpan:
        return _DeviceSpan(self, kind, num_bytes, None, is_aside=True)

    @contextmanager
    def _counted(self, kind: SpanKind, num_bytes: int) -> Iterator[None]:
        torch.cuda.nvtx.range_push(kind.name.lower())
        outer = self._ring.begin(kind)
        try:
            yield
        finally:
            self._ring.end(outer)
            self._ring.count(kind, num_bytes)
            torch.cuda.nvtx.range_pop()

    def begin(self, kind: SpanKind) -> tuple[int, torch.cuda.Event]:
        torch.cuda.nvtx.range_push(kind.name.lower())
        return self._ring.begin(kind), self._mark()

    def end(
        self,
        kind: SpanKind,
        outer: int,
        start: torch.cuda.Event,
        num_bytes: int,
        step_id: int | None,
        *,
        is_aside: bool,
    ) -> None:
        end = self._mark()
        torch.cuda.nvtx.range_pop()
        self._ring.end(outer)
        own_id, incarnation = self._ring.step
        marked = _Marked(
            kind, 0 if is_aside else outer, num_bytes,
            own_id if step_id is None else step_id, incarnation, end, _Events(start, end),
        )  # fmt: skip
        (self._aside if is_aside else self._pending).append(marked)

    def _mark(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def is_pending(self) -> bool:
        """Whether the device has yet to pass a span."""
        return bool(self._pending or self._aside)

    def collect(self) -> None:
        """Writes the records of those spans that are over. Once a second it looks at the clocks, which takes as long as
        some kernels."""
        self._clock.keep()
        self._write_passed()

    def _write_passed(self) -> None:
        for marked in (self._pending, self._aside):
            while marked and marked[0].over.query():
                self._write(marked.popleft())

    def flush(self) -> None:
        """Waits for the device, and writes all."""
        torch.cuda.synchronize(self._device)
        self.collect()

    def _write(self, one: _Marked) -> None:
        self._ring.record(
            one.kind, one.outer, *one.times.host_ns(self._clock),
            one.num_bytes, one.step_id, one.incarnation,
            weight=SAMPLED_EVERY if one.kind in COLLECTIVES else 1,
        )  # fmt: skip
        if isinstance(one.times, _Events):
            self._free += one.times


class _DeviceSpan:
    __slots__ = ("_about", "_is_aside", "_kind", "_outer", "_spans", "_start")

    def __init__(
        self,
        spans: DeviceSpans,
        kind: SpanKind,
        num_bytes: int,
        step_id: int | None,
        *,
        is_aside: bool,
    ) -> None:
        self._spans, self._kind, self._about = spans, kind, (num_bytes, step_id)
        self._is_aside = is_aside

    def __enter__(self) -> None:
        self._outer, self._start = self._spans.begin(self._kind)

    def __exit__(self, *_: object) -> None:
        self._spans.end(self._kind, self._outer, self._start, *self._about, is_aside=self._is_aside)
