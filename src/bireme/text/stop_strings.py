"""Finds stop strings in a growing text, and never gives out what may be the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Of the strings that are found the one that ends first counts, the longest of equals, so that
    it does not matter in which pieces the text comes."""

    def __init__(self, strings: Sequence[str], *, is_included: bool = False) -> None:
        self._strings, self._is_included = strings, is_included
        self._held, self._num_ignored = "", 0
        self.found: str | None = None

    def add(self, text: str, *, is_ignored: bool = False) -> str:
        """The text that can be given out; none comes after a stop string was found. One that ends in
        text that `is_ignored` does not count."""
        if self.found is not None:
            return ""
        self._held += text
        if is_ignored:
            self._num_ignored = len(self._held)
        starts = {stop: at for stop in self._strings if (at := self._find(stop)) >= 0}
        if starts:
            self.found = min(starts, key=lambda stop: (starts[stop] + len(stop), starts[stop]))
            stop = starts[self.found] + (len(self.found) if self._is_included else 0)
            return self._give(stop)
        return self._give(len(self._held) - self._num_doubtful())

    def _find(self, stop: str) -> int:
        return self._held.find(stop, max(0, self._num_ignored - len(stop) + 1))

    def finish(self) -> str:
        """What was held back, at the end of the text."""
        return "" if self.found is not None else self._give(len(self._held))

    def _give(self, size: int) -> str:
        given, self._held = self._held[:size], self._held[size:]
        self._num_ignored = max(0, self._num_ignored - size)
        return given

    def _num_doubtful(self) -> int:
        """The longest end of the text that a stop string begins with."""
        most = max((len(stop) for stop in self._strings), default=1) - 1
        for size in range(min(most, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._strings):
                return size
        return 0
