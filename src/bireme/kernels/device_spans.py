"""Spans by the clock of a CUDA device: from when its stream comes to where one begins to where one ends.

The host issues work ahead of the device, so its own clock tells nothing of it. CUDA events mark both
ends; their times are mapped to CLOCK_MONOTONIC of the host, and the records are written once the device
has passed them. Each span is an NVTX range of the same name as well.

Two events and their times cost the host about 20 us, so that the many collectives of a step are marked in
one step of `SAMPLED_EVERY` alone; the others are counted. In CUDA graphs they are stamped by kernels (`gpu/stamp.py`),
their own where they can: events would keep those from being chained. When a graph begins its first kernel tells: an
event before it is passed while the host still launches the graph.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from bireme.kernels.device_clock import DeviceClock
from bireme.kernels.host_copies import download
from bireme.trace import COLLECTIVES, SpanKind, SpanRing

_MOST_STAMPED = 4096  # sums of a graph
_NUM_LOOKED = 32  # kernels, to see what lies between two
MOST_BEGUN = 256  # graphs of which no span was written yet
SAMPLED_EVERY = 16


class _Events(NamedTuple):
    """Around a span."""

    start: torch.cuda.Event
    end: torch.cuda.Event

    def host_ns(self, clock: DeviceClock) -> tuple[int, int]:
        return clock.host_ns(self.start), clock.host_ns(self.end)


class _GraphBegins:
    """The times at which graphs began that note it, in the order of their launches."""

    def __init__(self, device: torch.device) -> None:
        self._places = torch.zeros(MOST_BEGUN, dtype=torch.int64, pin_memory=True)
        self._noted = self._places.numpy()
        self._count, self.num_launched = torch.zeros(1, dtype=torch.int64, device=device), 0
        self.note()  # it is compiled before it is captured
        self._count.zero_()

    def note(self) -> None:
        from bireme.kernels.gpu.stamp import note_time_next

        note_time_next(self._places, self._count)

    def stamp(self, number: int) -> int:
        """Of the launch with that number, which is over."""
        since = self.num_launched - number
        assert since <= MOST_BEGUN, f"{since} graphs began since, room is for {MOST_BEGUN}"
        return int(self._noted[number % MOST_BEGUN])


class _SinceGraph(NamedTuple):
    """From where the graph began of the launch with that number."""

    begins: _GraphBegins
    number: int
    end: torch.cuda.Event

    def host_ns(self, clock: DeviceClock) -> tuple[int, int]:
        end_ns = clock.host_ns(self.end)
        return min(clock.host_ns_of_stamp(self.begins.stamp(self.number)), end_ns), end_ns


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
    times: _Events | _SinceGraph | _Stamps


@dataclass
class CapturedSpans:
    """The collectives inside a CUDA graph, in the order of their stamps, with their bytes, and whether a kernel stamps
    its own. Without `notes_others` the others have none. `notes_begin`: its first kernel notes when it begins."""

    notes_others: bool
    notes_begin: bool
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
        self._begins: _GraphBegins | None = None  # once something is captured
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

    @contextmanager
    def span_since_graph(self, kind: SpanKind) -> Iterator[None]:
        """A span in which a graph is launched that notes its begin; it is from there on, and none where that fails."""
        assert self._begins is not None, "nothing was captured"
        number = self._begins.num_launched
        torch.cuda.nvtx.range_push(kind.name.lower())
        outer = self._ring.begin(kind)
        try:
            yield
        finally:
            if self._begins.num_launched > number:
                end = self._mark()
                times = _SinceGraph(self._begins, number, end)
                self._pending.append(_Marked(kind, outer, 0, *self._ring.step, end, times))
            self._ring.end(outer)
            torch.cuda.nvtx.range_pop()

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
    def capturing(
        self, *, notes_others: bool = True, notes_begin: bool = False
    ) -> Iterator[CapturedSpans]:
        """What runs within is captured in a CUDA graph: its spans are told by `replayed`. With `notes_begin`,
        `note_begin` is the first of it."""
        from bireme.kernels.gpu.stamp import note_time

        if self._begins is None:
            self._clock.look_at_stamps(self._looked)
            note_time(self.unread)  # it is compiled before it is captured
            self._begins = _GraphBegins(self._device)
        self._captured = CapturedSpans(notes_others, notes_begin)
        try:
            yield self._captured
        finally:
            self._captured = None

    def note_begin(self) -> None:
        """In a graph that is captured with `notes_begin`, before all else."""
        assert self._begins is not None, "nothing is captured"
        self._begins.note()

    def replayed(self, captured: CapturedSpans) -> None:
        """Of a graph that was launched just now."""
        if captured.notes_begin and self._begins is not None:
            self._begins.num_launched += 1
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
        elif isinstance(one.times, _SinceGraph):
            self._free.append(one.times.end)


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
