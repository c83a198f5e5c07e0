"""Which requests that wait may begin: as many as the next steps can begin to compute, while the cache has room."""

from __future__ import annotations

from collections.abc import Iterator

from bireme.engine.limits import SchedulerLimits
from bireme.engine.prefixes import Prefixes
from bireme.engine.request_state import RequestState
from bireme.engine.waiting_queue import OrderedRequests
from bireme.kvcache.block_manager import BlockManager

_STEPS_AHEAD = 2  # a stage, that prompts which have begun may fill: they cannot be overtaken


class Admission:
    """The first that waits goes first; while it has no room, none behind it begins."""

    def __init__(self, limits: SchedulerLimits, blocks: BlockManager, prefixes: Prefixes) -> None:
        self._limits, self._blocks, self._prefixes = limits, blocks, prefixes
        self._refused: tuple[RequestState, tuple[int, ...]] | None = None

    def look_again(self) -> None:
        """A request has left: the one that had no room may have some now."""
        self._refused = None

    def admitted(
        self, waiting: OrderedRequests, prefilling: OrderedRequests, num_running: int
    ) -> Iterator[tuple[RequestState, int]]:
        """Takes requests off the queue, and says how many blocks of each are cached; each is to be among those that
        prefill before the next one is asked for."""
        chunk, available = self._limits.max_num_batched_tokens, self._blocks.num_available
        if self._refused == (waiting.first, available):
            return
        most = _STEPS_AHEAD * self._limits.pp_size * chunk
        pending = sum(state.num_uncomputed for state in prefilling)
        reserve = self._reserve(prefilling, num_running)
        while waiting and pending < most:
            state = waiting.first
            keys, num_tokens = self._prefixes.cached_keys(state), len(state.token_ids)
            if not self._blocks.can_start(keys, num_tokens + 1, chunk, reserve):
                self._refused = (state, available)
                return
            waiting.remove(state)
            yield state, len(keys)
            pending += state.num_uncomputed
            needed = self._blocks.needed_at_once(num_tokens, chunk)
            reserve = [kept + more + 1 for kept, more in zip(reserve, needed, strict=True)]

    def _reserve(self, prefilling: OrderedRequests, num_running: int) -> list[int]:
        """Blocks that running requests will soon need: the rest of each prompt, one for a decode."""
        chunk = self._limits.max_num_batched_tokens
        missing = [
            self._blocks.missing_at_once(state.slot, state.num_given, chunk)
            for state in prefilling
            if state.slot is not None
        ]
        none = (0,) * self._blocks.num_kinds
        return [sum(counts) + num_running for counts in zip(none, *missing, strict=True)]
