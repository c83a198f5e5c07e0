"""Why a rank idles: by where the step is that it waits for. The table is in `docs/metrics.md`."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import pairwise

from bireme.observe.timeline import Driver, Key, RankStep, StageSteps, Track


class Row(StrEnum):
    """Of the ledger: every instant of a rank is in one. The last are causes of idleness; UNATTRIBUTED where
    the spans that would tell are gone."""

    COMPUTE = "compute"
    COLLECTIVE_MOVE = "collective_move"
    COLLECTIVE_WAIT = "collective_wait"
    TRANSFER = "transfer"
    FILL_DRAIN = "fill_drain"
    IMBALANCE = "imbalance"
    TOKEN_DEPENDENCY = "token_dependency"
    STARVED = "starved"
    HOST = "host"
    UNATTRIBUTED = "unattributed"


Piece = tuple[int, int, Row]  # [start, end) in nanoseconds


class Causes:
    """Cuts idle intervals wherever what is waited for changes state."""

    def __init__(
        self,
        tracks: Mapping[Key, Track],
        stages: Sequence[Sequence[RankStep]],
        driver: Driver,
    ) -> None:
        self._tracks, self._driver = tracks, driver
        # Micro-batches of images need nothing of one another: nothing comes back to the first stage.
        self._has_token_dependency = any(step.receives for step in stages[0]) if stages else False
        self._num_stages = len(stages)
        self._stages = [StageSteps(steps) for steps in stages]
        self._in_order = list(tracks.values())
        self._place = {key: index for index, key in enumerate(tracks)}
        self._ready = sorted(map(self._ready_ns, self._in_order))
        self._ends = sorted(track.done_ns for track in self._in_order if track.done_ns is not None)
        self._changes = sorted({*driver.changes_ns, *_changes(self._in_order)})

    def pieces(
        self, start_ns: int, end_ns: int, awaited: Key | None, *, is_own: bool = True
    ) -> Iterator[Piece]:
        """Of an interval in which a rank idled, waiting for the step `awaited`, None where none came.

        `is_own` for a step that it is to begin, not one whose ids it needs.
        """
        first = bisect_right(self._changes, start_ns)
        last = bisect_left(self._changes, end_ns)
        edges = [start_ns, *self._changes[first:last], end_ns]
        for start, end in pairwise(edges):
            if start < end:
                yield start, end, self._at(start, awaited, is_own=is_own)

    def _ready_ns(self, track: Track) -> int:
        """When all that a step needs to begin was there."""
        needed = None if track.needs is None else self._tracks.get(track.needs)
        last = None if needed is None else needed.parts[-1]
        return track.submit_ns if last is None else max(track.submit_ns, last.sent_ns)

    def _at(self, time_ns: int, key: Key | None, *, is_own: bool) -> Row:
        track = None if key is None else self._tracks.get(key)
        if track is None or time_ns < track.submit_ns:
            return self._before_submission(time_ns, track) if is_own else Row.UNATTRIBUTED
        return self._by_place(time_ns, track, is_bound=not (is_own and track.is_first))

    def _by_place(self, time_ns: int, track: Track, *, is_bound: bool) -> Row:
        """Of a rank that waits for a step, by where that one is. `is_bound` is false where the pipeline
        fills with it, or drains behind it: no other step could be worked on meanwhile."""
        for stage, part in enumerate(track.parts):
            if part is None:
                return Row.UNATTRIBUTED
            if time_ns < part.work_ns:
                return self._before_work(time_ns, track, stage, part)
            if time_ns < part.sent_ns:
                return self._in_work(time_ns) if is_bound else Row.FILL_DRAIN
        return Row.TRANSFER  # its ids are on their way

    def _before_submission(self, time_ns: int, track: Track | None) -> Row:
        driver = self._driver
        if driver.is_empty(time_ns):
            return Row.STARVED
        if not driver.waits(time_ns):
            return Row.HOST if driver.works(time_ns) else Row.UNATTRIBUTED
        empty_ns = driver.next_empty_ns(time_ns)
        in_flight = self._in_flight(time_ns)
        if not in_flight:
            return Row.HOST
        if track is None or (empty_ns is not None and empty_ns < track.submit_ns):
            return self._by_place(time_ns, in_flight[-1], is_bound=False)  # nothing more comes
        return self._by_place(time_ns, in_flight[0], is_bound=True)

    def _before_work(self, time_ns: int, track: Track, stage: int, part: RankStep) -> Row:
        """The step is told, and perhaps sent, to a stage that has not begun it."""
        other = self._stages[stage].at(time_ns)
        if other is not None and other.key != track.key:
            return self._behind(time_ns, stage, other)
        if time_ns < part.start_ns:
            return Row.HOST  # nothing holds it up but its process
        if stage:
            return Row.TRANSFER
        needed = None if track.needs is None else self._tracks.get(track.needs)
        return Row.HOST if needed is None else self._by_place(time_ns, needed, is_bound=True)

    def _behind(self, time_ns: int, stage: int, step: RankStep) -> Row:
        """Of what waits for a stage that is at another step: it works, or waits itself."""
        full = self.in_slot(stage, step.key)
        if time_ns < step.work_ns:
            held_up_by = step.key
        elif full is not None and step.sent_ns <= time_ns < full[1]:
            held_up_by = full[0]
        else:
            return Row.IMBALANCE
        track = self._tracks.get(held_up_by)
        return Row.UNATTRIBUTED if track is None else self._by_place(time_ns, track, is_bound=True)

    def _in_work(self, time_ns: int) -> Row:
        """Is the stage that works too slow, or are there too few steps that could be worked on?"""
        is_full = self._num_independent(time_ns) >= self._num_stages
        if is_full or not self._has_token_dependency:
            return Row.IMBALANCE
        return Row.TOKEN_DEPENDENCY if self._is_any_held_up(time_ns) else Row.FILL_DRAIN

    def _is_any_held_up(self, time_ns: int) -> bool:
        """By ids: some step is ready later, and before there is no request."""
        index = bisect_right(self._ready, time_ns)
        if index == len(self._ready):
            return False
        empty_ns = self._driver.next_empty_ns(time_ns)
        return empty_ns is None or self._ready[index] < empty_ns

    def _num_independent(self, time_ns: int) -> int:
        """Steps in flight that wait for no other's ids."""
        return bisect_right(self._ready, time_ns) - bisect_right(self._ends, time_ns)

    def _in_flight(self, time_ns: int) -> list[Track]:
        """Oldest first."""
        stop = bisect_right(self._in_order, time_ns, key=lambda track: track.submit_ns)
        start = bisect_right(
            self._in_order, time_ns, hi=stop, key=lambda track: track.done_ns or track.submit_ns
        )
        return self._in_order[start:stop]

    def next_after(self, key: Key | None) -> Key | None:
        """The step that was told behind another; the first for None."""
        index = (
            0 if key is None else self._place[key] + 1 if key in self._place else len(self._place)
        )
        return self._in_order[index].key if index < len(self._in_order) else None

    def in_slot(self, stage: int, key: Key) -> tuple[Key, int] | None:
        """The step whose message was where the one of this step goes, and when the next stage took it: a
        link holds one more than there are stages."""
        index = self._place.get(key, 0) - (self._num_stages + 1)
        if index < 0 or stage == self._num_stages - 1:
            return None
        before = self._in_order[index]
        taken = before.parts[stage + 1]
        return None if taken is None else (before.key, taken.work_ns)


def _changes(tracks: Sequence[Track]) -> Iterator[int]:
    for track in tracks:
        yield track.submit_ns
        for part in track.parts:
            if part is not None:
                yield from (part.start_ns, part.work_ns, part.sent_ns, part.end_ns)
