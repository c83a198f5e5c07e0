"""Which tokens of which requests go into the next batch: plain Python, no torch, no clock.

At most `pp_size + 1` batches are in flight. The requests that decode are spread evenly over
`pp_size` groups, which take turns: while each stage works on one of them, the batch behind waits at
the first stage for the last ids of its own group. At one stage that means that the next decode is
scheduled before the last one's tokens are known.

A step takes a token of each request of a group and fills up with prompts, in chunks; the oldest
goes first. Where the cache is full, the youngest gives its blocks back and is computed again later.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bireme.engine.admission import Admission
from bireme.engine.chunks import chunk_cost, chunk_tokens
from bireme.engine.decode_groups import DecodeGroups
from bireme.engine.limits import SchedulerLimits
from bireme.engine.prefixes import Prefixes
from bireme.engine.request_state import News, RequestState
from bireme.engine.waiting_queue import Deadlines, OrderedRequests
from bireme.errors import CapacityError, RequestError
from bireme.kvcache.block_manager import BlockManager
from bireme.parallel.layout import CacheKind
from bireme.request import (
    WARM_UP_STEP,
    Request,
    ScheduledBatch,
    ScheduledPiece,
    SlotSetup,
    StepOutput,
    TokenLogprobs,
)

PRIORITY_SPAN_S = 30.0


@dataclass(slots=True)
class _InFlight:
    sampled: list[RequestState]
    asked: dict[int, RequestState]  # of requests that asked for log-probabilities of their prompt


@dataclass(slots=True)
class _Choice:
    """What goes into the next batch."""

    pieces: list[ScheduledPiece]
    setups: list[SlotSetup]
    sampled: list[RequestState]
    asked: dict[int, RequestState]


_NO_BLOCKS: list[list[int]] = []


class Scheduler:
    """Waiting and running requests, and the batches in flight."""

    def __init__(self, limits: SchedulerLimits, kinds: Sequence[CacheKind]) -> None:
        self.limits = limits
        self.blocks = BlockManager(kinds, limits.block_size)
        self._prefixes = Prefixes(
            self.blocks, is_on=limits.has_prefix_caching, depends_on_length=limits.depends_on_length
        )
        self._admission = Admission(limits, self.blocks, self._prefixes)
        self.max_in_flight = limits.pp_size + 1
        self.num_preemptions = 0
        self.num_prefix_queries = self.num_prefix_hits = 0  # tokens
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._states: dict[str, RequestState] = {}
        self._waiting = OrderedRequests()
        self._prefilling = OrderedRequests()
        self._groups = DecodeGroups(limits.pp_size, limits.context_per_token)
        self._slots: list[RequestState | None] = [None] * limits.max_num_seqs
        self._deadlines = Deadlines()
        self._in_flight: deque[_InFlight] = deque()
        self._num_added = 0
        self._next_step_id = WARM_UP_STEP + 1
        self._incarnation = 0

    # --- requests ------------------------------------------------------------------------------

    def add(self, request: Request) -> RequestState:
        """Lets a request wait; CapacityError where seats and queue are full or the cache is too small."""
        chunk = self.limits.max_num_batched_tokens
        if not self.room_to_wait:
            raise CapacityError(
                f"{len(self._states)} requests are there, of which {self.limits.max_num_seqs} may run "
                f"and {self.limits.max_num_waiting} wait; try again later"
            )
        if not self.blocks.can_ever_hold(request.max_len, chunk):
            raise CapacityError(
                f"request {request.request_id} can reach {request.max_len} tokens, more than the "
                "cache holds; ask for fewer, or give the cache more memory"
            )
        if request.request_id in self._states:
            raise RequestError(f"request {request.request_id} is there already")
        due = request.arrival_s + request.priority * PRIORITY_SPAN_S
        state = RequestState(request, (due, self._num_added), list(request.prompt_token_ids))
        self._num_added += 1
        self._states[request.request_id] = state
        self._waiting.add(state)
        self._deadlines.add(state)
        return state

    def abort(self, request_id: str, reason: str = "abort") -> RequestState | None:
        """Ends a request; its slot and blocks are free for the next schedule. None if it has ended."""
        state = self._states.get(request_id)
        if state is None:
            return None
        state.finish_reason = reason
        self._end(state)
        return state

    def abort_all(self) -> None:
        """Ends every request; batches in flight must still be collected."""
        for request_id in list(self._states):
            self.abort(request_id)

    def take_expired(self, now_s: float) -> list[RequestState]:
        """Ends the requests whose deadline has passed."""
        late = [self._states[request_id] for request_id in self._deadlines.passed(now_s)]
        for state in late:
            self.abort(state.request.request_id, "timeout")
        return late

    @property
    def has_unfinished(self) -> bool:
        return bool(self._states)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def state_in(self, slot: int) -> RequestState:
        """The request that has a slot."""
        state = self._slots[slot]
        assert state is not None
        return state

    @property
    def room_to_wait(self) -> int:
        """How many more requests may come now: those that find a seat at the next step count as
        running."""
        most = self.limits.max_num_waiting
        if most is None:
            return sys.maxsize
        return max(0, most + self.limits.max_num_seqs - len(self._states))

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return self._groups.num_members

    def _end(self, state: RequestState) -> None:
        del self._states[state.request.request_id]
        self._deadlines.remove(state)
        if state.slot is None:
            self._waiting.remove(state)
        else:
            self._leave_slot(state)

    def _leave_slot(self, state: RequestState) -> None:
        """At once: whoever gets the blocks or the slot next is executed later, by step_id order."""
        assert state.slot is not None
        if not self._groups.leave(state):
            self._prefilling.remove(state)
        self.blocks.release(state.slot)
        self._free_slots.append(state.slot)
        self._slots[state.slot] = None
        state.slot = None
        self._admission.look_again()

    # --- a step --------------------------------------------------------------------------------

    def schedule(self) -> ScheduledBatch | None:
        """The next batch; None when nothing can be added to what is in flight."""
        if len(self._in_flight) >= self.max_in_flight:
            return None
        self._admit()
        for group in self._groups.turns():
            choice = _Choice([], [], [], {})
            self._choose_decodes(group, choice)
            self._choose_prompts(group, choice)
            if choice.pieces:
                self._groups.took_turn(group)
                return self._batch(choice)
        return None

    def _batch(self, choice: _Choice) -> ScheduledBatch:
        batch = ScheduledBatch(self._incarnation, self._next_step_id, choice.setups, choice.pieces)
        self._in_flight.append(_InFlight(choice.sampled, choice.asked))
        self._next_step_id += 1
        return batch

    def _choose_decodes(self, group: int, choice: _Choice) -> None:
        self._groups.level(group)
        budget, step_id = self.limits.max_num_batched_tokens, self._next_step_id
        apart = self.limits.pp_size if self._prefilling else 1
        pieces, sampled = choice.pieces, choice.sampled
        for state in self._groups.decoding(group):
            num_in_flight = state.num_in_flight
            if num_in_flight and (num_in_flight > 1 or step_id - state.last_step_id < apart):
                continue
            start, slot = state.num_computed, state.slot
            if start >= state.last_decode or state.is_leaving or slot is None:
                continue
            blocks = _NO_BLOCKS
            if start >= state.num_places:
                new = self._grow(state, start, start + 1)
                if new is None:
                    continue
                blocks = new
            pieces.append(ScheduledPiece(slot, start, 1, None, blocks, True, state.needs_mask))
            sampled.append(state)
            state.num_computed = start + 1
            state.num_in_flight = num_in_flight + 1
            state.last_step_id = step_id
            if len(pieces) == budget:
                break
        if len(pieces) == budget:  # the others come first next time
            self._groups.put_last(sampled)

    def _choose_prompts(self, group: int, choice: _Choice) -> None:
        """Chunks of prompts that have begun, and those that begin with this group; oldest first, so
        that none gives its blocks to a younger one of the same batch."""
        limits = self.limits
        most = limits.max_num_batched_tokens
        budget = most - len(choice.pieces)
        if not self._prefilling:
            return
        given = sum(state.num_given for state in self._prefilling)
        sizes, ratio = limits.chunks, limits.context_per_token
        cost = chunk_cost(given, limits.pp_size, most, sizes, ratio)
        for state in self._prefilling:
            if budget <= 0:
                return
            if state.slot is None or (state.is_new and state.group != group):
                continue
            if state.is_new:
                self._prefixes.share(state, state.slot)
            start = state.num_computed
            num_tokens = chunk_tokens(
                start, state.num_given, budget, cost, sizes, ratio, beside=most - budget
            )
            blocks = self._grow(state, start, start + num_tokens)
            if blocks is None:
                return
            budget -= num_tokens
            self._put_chunk(state, state.slot, num_tokens, blocks, choice)

    def _put_chunk(
        self,
        state: RequestState,
        slot: int,
        num_tokens: int,
        blocks: list[list[int]],
        choice: _Choice,
    ) -> None:
        start = state.num_computed
        stop = state.num_computed = start + num_tokens
        samples = stop == state.num_given
        if state.is_new:
            choice.setups.append(state.setup(slot))
            state.is_new = False
            self.num_prefix_queries += state.num_given
            self.num_prefix_hits += state.num_cached
            if state.shared:
                new = blocks or [[]] * len(state.shared)
                blocks = [old + more for old, more in zip(state.shared, new, strict=True)]
        if state.request.params.prompt_logprobs is not None:
            choice.asked[slot] = state
        ids = state.token_ids[start:stop]
        masked = samples and state.needs_mask
        choice.pieces.append(ScheduledPiece(slot, start, num_tokens, ids, blocks, samples, masked))
        self._prefixes.publish(state)
        if samples:
            choice.sampled.append(state)
            state.num_in_flight += 1
            state.last_step_id = self._next_step_id
            self._prefilling.remove(state)
            self._groups.begin_decoding(state)

    def update(self, output: StepOutput) -> list[News]:
        """Takes the oldest batch's output; what it brought to requests that have not ended."""
        batch = self._in_flight.popleft()
        news: list[News] = []
        parts = {batch.asked[part.slot]: part for part in output.prompt_logprobs}
        logprobs: Iterable[list[TokenLogprobs]] = output.logprobs or ([],) * len(batch.sampled)
        for state, ids, likely in zip(batch.sampled, output.token_ids, logprobs, strict=True):
            state.num_in_flight -= 1
            part = parts.pop(state, None)
            if state.finish_reason is not None:
                continue
            taken = self._append(state, ids)
            news.append(News(state, taken, likely[: len(taken)], part))
            if state.finish_reason is not None:
                self._end(state)
            elif state.is_leaving and not state.num_in_flight:
                self._preempt(state)
        news += [
            News(state, [], [], part)
            for state, part in parts.items()
            if state.finish_reason is None
        ]
        return news

    def _append(self, state: RequestState, ids: list[int]) -> list[int]:
        for index, token_id in enumerate(ids):
            state.append(token_id)
            if state.finish_reason is not None:
                return ids[: index + 1]
        if len(state.token_ids) >= (state.num_published + 1) * self.limits.block_size:
            self._prefixes.publish(state)
        return ids

    # --- admission and preemption --------------------------------------------------------------

    def _admit(self) -> None:
        if not (self._waiting and self._free_slots):
            return
        for state, num_cached_blocks in self._admission.admitted(
            self._waiting, self._prefilling, self.num_running
        ):
            self._start(state, num_cached_blocks)
            if not self._free_slots:
                return

    def _start(self, state: RequestState, num_cached_blocks: int) -> None:
        slot = state.slot = self._free_slots.pop()
        state.is_new, state.num_computed = True, 0
        state.num_given = len(state.token_ids)
        state.num_cached = num_cached_blocks * self.limits.block_size
        self.blocks.start(slot, [])
        self._slots[slot] = state
        self._groups.join(state)
        self._prefilling.add(state)

    def _preempt(self, state: RequestState) -> None:
        """Back to the queue, at the place that it had; what it computed stays cached for a while."""
        self._leave_slot(state)
        state.is_leaving = False
        state.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting.add(state)

    def _grow(self, state: RequestState, start: int, num_tokens: int) -> list[list[int]] | None:
        """Blocks until the request holds `num_tokens`, taken from the youngest if need be; None where
        it has to wait."""
        slot = state.slot
        assert slot is not None
        self.blocks.drop_unseen(slot, start)
        while not self.blocks.can_extend(slot, num_tokens):
            youngest = max(self._running(), key=lambda state: state.order)
            if youngest is state:
                return None
            if youngest.num_in_flight:
                youngest.is_leaving = True
                return None
            self._preempt(youngest)
        new = self.blocks.extend(slot, num_tokens)
        state.num_places = self.blocks.num_held(slot)
        return new

    def _running(self) -> Iterable[RequestState]:
        yield from self._groups
        yield from self._prefilling

    def check_integrity(self) -> None:
        """No block lost or held twice, every slot free or taken, every request in one place."""
        self.blocks.check_integrity()
        running = list(self._running())
        slots = [state.slot for state in running if state.slot is not None]
        assert sorted([*slots, *self._free_slots]) == list(range(self.limits.max_num_seqs))
        assert len(running) + len(self._waiting) == len(self._states), "a request was lost"
        assert self.num_running == len(running), "a group's members were miscounted"
