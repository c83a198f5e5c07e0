"""Requests in the order in which they are due, and when their time is up."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import takewhile
from operator import attrgetter

from bireme.engine.request_state import RequestState

_by_order = attrgetter("order")


class OrderedRequests:
    """A list of requests, the first due first."""

    def __init__(self) -> None:
        self._states: list[RequestState] = []

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[RequestState]:
        """Those that are there now, whatever happens to the list meanwhile."""
        return iter(tuple(self._states))

    @property
    def first(self) -> RequestState:
        return self._states[0]

    def add(self, state: RequestState) -> None:
        insort(self._states, state, key=_by_order)

    def remove(self, state: RequestState) -> None:
        index = bisect_left(self._states, state.order, key=_by_order)
        assert self._states[index] is state
        del self._states[index]


class Deadlines:
    """Seconds at which requests end, whatever they wait for."""

    def __init__(self) -> None:
        self._due: list[tuple[float, str]] = []

    def add(self, state: RequestState) -> None:
        if state.request.deadline_s is not None:
            insort(self._due, (state.request.deadline_s, state.request.request_id))

    def remove(self, state: RequestState) -> None:
        if state.request.deadline_s is not None:
            del self._due[
                bisect_left(self._due, (state.request.deadline_s, state.request.request_id))
            ]

    def passed(self, now_s: float) -> list[str]:
        """Ids of requests whose time is up."""
        return [request_id for _, request_id in takewhile(lambda due: due[0] <= now_s, self._due)]
