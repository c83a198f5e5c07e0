"""Which tokens of which requests go into the next batch: plain Python, no torch, no clock.

At most `pp_size + 1` batches are in flight, and the running requests are spread evenly over them.
A request is admitted when a slot and all the cache blocks that it can ever need are free, so that
nothing is preempted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from bireme.kvcache.block_manager import BlockManager
from bireme.parallel.layout import CacheKind
from bireme.request import (
    Request,
    SamplingSetup,
    ScheduledBatch,
    ScheduledPiece,
    SlotSetup,
    StepOutput,
)


@dataclass
class RunningRequest:
    """A request in a slot. `num_computed` tokens are in the cache or under way to it."""

    request: Request
    slot: int
    num_computed: int = 0
    num_in_flight: int = 0
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | None = None

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed < self.num_prompt

    @property
    def is_all_scheduled(self) -> bool:
        """True once the step that yields its last allowed token is under way."""
        return self.num_computed >= self.request.max_len - 1

    def append(self, token_id: int) -> None:
        """Takes a sampled id and sees whether it ends the request."""
        self.token_ids.append(token_id)
        if token_id in self.request.eos_token_ids:
            self.finish_reason = "stop"
        elif token_id in self.request.params.stop_token_ids:
            self.finish_reason, self.stop_reason = "stop", token_id
        elif len(self.token_ids) >= self.request.params.max_tokens:
            self.finish_reason = "length"


class Scheduler:
    """Waiting and running requests, and the batches in flight."""

    def __init__(
        self,
        *,
        pp_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        kinds: Sequence[CacheKind],
        block_size: int,
    ) -> None:
        self.max_in_flight = pp_size + 1
        self._max_decodes_in_flight = 2 if pp_size == 1 else 1
        self._max_tokens = max_num_batched_tokens
        self._num_kinds = len(kinds)
        self.blocks = BlockManager(min(kind.num_blocks for kind in kinds), block_size)
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._waiting: deque[Request] = deque()
        self._running: dict[int, RunningRequest] = {}
        self._in_flight: deque[list[RunningRequest]] = deque()
        self._next_step_id = 0
        self._incarnation = 0

    def add(self, request: Request) -> None:
        self._waiting.append(request)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def schedule(self) -> ScheduledBatch | None:
        """The next batch; None when nothing can be added to what is in flight."""
        if len(self._in_flight) >= self.max_in_flight:
            return None
        self._admit()
        pieces = self._choose()
        if not pieces:
            return None
        setups = [self._setup(self._running[piece.slot]) for piece in pieces if piece.start == 0]
        batch = ScheduledBatch(self._incarnation, self._next_step_id, setups, pieces)
        self._in_flight.append([self._running[piece.slot] for piece in pieces if piece.samples])
        self._next_step_id += 1
        return batch

    def update(self, output: StepOutput) -> list[tuple[RunningRequest, list[int]]]:
        """Takes the oldest batch's output; returns each request that got tokens, with them.

        Tokens of a request that ended meanwhile are dropped.
        """
        news = []
        for run, ids in zip(self._in_flight.popleft(), output.token_ids, strict=True):
            run.num_in_flight -= 1
            if run.finish_reason is not None:
                continue
            for token_id in ids:
                run.append(token_id)
            news.append((run, ids))
            if run.finish_reason is not None:
                self._release(run)
        return news

    def abort_all(self) -> None:
        """Forgets every request; batches in flight must still be collected."""
        self._waiting.clear()
        for run in list(self._running.values()):
            run.finish_reason = "abort"
            self._release(run)

    def _release(self, run: RunningRequest) -> None:
        """At once: whoever gets the blocks or the slot next is executed later, by step_id order."""
        del self._running[run.slot]
        self.blocks.release(run.slot)
        self._free_slots.append(run.slot)

    def _admit(self) -> None:
        while self._waiting and self._free_slots:
            request, slot = self._waiting[0], self._free_slots[-1]
            if not self.blocks.can_hold(slot, request.max_len + self._num_promised()):
                return
            self._waiting.popleft()
            self._free_slots.pop()
            self._running[slot] = RunningRequest(request, slot)

    def _num_promised(self) -> int:
        """Tokens of free blocks that running requests may still ask for."""
        missing = sum(
            self.blocks.num_missing(run.slot, run.request.max_len) for run in self._running.values()
        )
        return missing * self.blocks.block_size

    def _choose(self) -> list[ScheduledPiece]:
        """Least recently scheduled requests first, an even share of them at a time."""
        ready = [run for run in self._running.values() if self._is_ready(run)]
        if self._max_decodes_in_flight == 1:
            ready = ready[: max(1, -(-len(self._running) // self.max_in_flight))]
        budget, pieces = self._max_tokens, []
        for run in ready:
            if budget == 0:
                break
            piece = self._piece(run, budget)
            budget -= piece.num_tokens
            pieces.append(piece)
            self._running[run.slot] = self._running.pop(run.slot)
        return pieces

    def _is_ready(self, run: RunningRequest) -> bool:
        if run.is_prefilling:
            return True
        return not run.is_all_scheduled and run.num_in_flight < self._max_decodes_in_flight

    def _piece(self, run: RunningRequest, budget: int) -> ScheduledPiece:
        start = run.num_computed
        num_tokens = min(budget, run.num_prompt - start) if run.is_prefilling else 1
        is_given = run.is_prefilling
        run.num_computed += num_tokens
        samples = not run.is_prefilling
        run.num_in_flight += samples
        ids = list(run.request.prompt_token_ids[start : run.num_computed]) if is_given else None
        new_blocks = self.blocks.extend(run.slot, run.num_computed)
        tables = [new_blocks] * self._num_kinds
        return ScheduledPiece(run.slot, start, num_tokens, ids, tables, samples)

    def _setup(self, run: RunningRequest) -> SlotSetup:
        params = run.request.params
        sampling = SamplingSetup(
            seed=run.request.seed,
            temperature=0.0 if params.is_greedy else params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
        )
        return SlotSetup(run.slot, run.request.max_len, sampling)
