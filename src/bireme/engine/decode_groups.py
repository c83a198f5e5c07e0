"""The requests that decode, in groups that take turns: a group a stage, each about as much work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bireme.engine.request_state import RequestState


class DecodeGroups:
    """Members are counted from admission on; they decode once their prompt is on its way.

    `context_per_token` as in `SchedulerLimits`.
    """

    def __init__(self, num_groups: int, context_per_token: float) -> None:
        self._context_per_token = context_per_token
        self._groups: list[dict[int, RequestState]] = [{} for _ in range(num_groups)]
        self._num_members = [0] * num_groups
        self._next = 0

    def __iter__(self) -> Iterator[RequestState]:
        for group in self._groups:
            yield from group.values()

    @property
    def num_members(self) -> int:
        return sum(self._num_members)

    def turns(self) -> Iterator[int]:
        """The groups, from the one whose turn it is."""
        for turn in range(len(self._groups)):
            yield (self._next + turn) % len(self._groups)

    def took_turn(self, group: int) -> None:
        self._next = (group + 1) % len(self._groups)

    def decoding(self, group: int) -> tuple[RequestState, ...]:
        return tuple(self._groups[group].values())

    def join(self, state: RequestState) -> None:
        """A request begins, in the lightest group."""
        state.group = self._lightest()
        self._num_members[state.group] += 1

    def begin_decoding(self, state: RequestState) -> None:
        assert state.slot is not None
        self._groups[state.group][state.slot] = state

    def leave(self, state: RequestState) -> bool:
        """True if it was decoding."""
        assert state.slot is not None
        self._num_members[state.group] -= 1
        return self._groups[state.group].pop(state.slot, None) is not None

    def put_last(self, states: Iterable[RequestState]) -> None:
        """The other members of their group come first next time."""
        for state in states:
            members = self._groups[state.group]
            assert state.slot is not None
            members[state.slot] = members.pop(state.slot)

    def level(self, group: int) -> None:
        """Moves what a group has too many to the lightest one, whose turn comes later."""
        while self._num_members[group] > min(self._num_members) + 1:
            target, members = self._lightest(), self._groups[group]
            movable = [state for state in members.values() if not state.num_in_flight]
            if not movable:
                return
            is_heavier = self._mean_cost(group) > self._mean_cost(target)
            moved = (max if is_heavier else min)(movable, key=lambda state: len(state.token_ids))
            self.leave(moved)
            moved.group = target
            self._num_members[target] += 1
            self.begin_decoding(moved)

    def _lightest(self) -> int:
        """The group with the fewest requests; among equals the one with the least context."""
        fewest = min(self._num_members)
        light = [group for group, count in enumerate(self._num_members) if count == fewest]
        return light[0] if len(light) == 1 else min(light, key=self._cost)

    def _cost(self, group: int) -> float:
        """Of a token of each member, in tokens without context."""
        members = self._groups[group].values()
        return sum(1 + len(state.token_ids) / self._context_per_token for state in members)

    def _mean_cost(self, group: int) -> float:
        return self._cost(group) / max(1, len(self._groups[group]))
