"""An executor that replays what each stage of each batch reads and writes in the cache, and checks it,
and that masks have come, and were made of the tokens before, when the last stage samples.

A place holds what a model's keys and values depend on: the token and all before it. Each stage runs
its own copy of the cache, as far behind the others as a random number says. The next id is a hash of
what was read, so that a stale or foreign block shows in the tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from random import Random
from zlib import crc32

from bireme.parallel.layout import CacheKind
from bireme.request import ScheduledBatch, ScheduledPiece, StepMasks, StepOutput

VOCABULARY = 50
Prefix = int  # a hash of tokens


def extended(prefix: Prefix, token_id: int) -> Prefix:
    return crc32(token_id.to_bytes(4, "little"), prefix)


def next_id(prefix: Prefix) -> int:
    return prefix % VOCABULARY


def continued(prompt: Sequence[int], max_tokens: int) -> list[int]:
    """What follows a prompt, whatever else runs."""
    prefix = 0
    for token_id in prompt:
        prefix = extended(prefix, token_id)
    ids: list[int] = []
    for _ in range(max_tokens):
        ids.append(next_id(prefix))
        prefix = extended(prefix, ids[-1])
    return ids


def prefixes(ids: Sequence[int]) -> list[Prefix]:
    """What the cache must hold at each position."""
    return list(accumulate(ids, extended, initial=0))[1:]


def mask_behind(prefix: Prefix) -> bytes:
    """Stands for the ids that may follow: nobody chooses by it, but it says what it was made of."""
    return prefix.to_bytes(4, "little")


class PrefixMatcher:
    """Allows whatever comes, and ends the request after `num_tokens`."""

    def __init__(self, prompt: Sequence[int], num_tokens: int) -> None:
        self._prefix, self._num_left = prefixes(prompt)[-1], num_tokens

    def accept(self, token_ids: list[int]) -> None:
        for token_id in token_ids:
            self._prefix = extended(self._prefix, token_id)
        self._num_left -= len(token_ids)

    def mask(self) -> bytes:
        return mask_behind(self._prefix)

    @property
    def is_stopped(self) -> bool:
        return self._num_left <= 0


@dataclass
class _Stage:
    """One stage's cache and tables, and the batches that it has not run."""

    kinds: Sequence[CacheKind]
    block_size: int
    truths: Sequence[list[Prefix]]  # by the request's seed
    cache: dict[tuple[int, int], Prefix] = field(default_factory=dict)  # (kind, place)
    tables: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # (kind, slot)
    queue: deque[ScheduledBatch] = field(default_factory=deque)
    last_ids: dict[int, int] = field(default_factory=dict)
    owners: dict[int, int] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)

    def run(self, batch: ScheduledBatch) -> list[list[int]]:
        """The ids of the slots that sample."""
        for setup in batch.setups:
            self.owners[setup.slot] = setup.sampling.seed
            self.lengths.pop(setup.slot, None)
            for kind in range(len(self.kinds)):
                self.tables[kind, setup.slot] = []
        for piece in batch.pieces:
            for kind, blocks in enumerate(piece.new_blocks):
                self.tables[kind, piece.slot].extend(blocks)
        for piece in batch.pieces:  # a layer writes the whole step before anything is read
            self._write(piece)
        return [[self._read(piece)] for piece in batch.pieces if self._read(piece) >= 0]

    def _place(self, kind: int, slot: int, position: int) -> int:
        block = self.tables[kind, slot][position // self.block_size]
        return block * self.block_size + position % self.block_size

    def _write(self, piece: ScheduledPiece) -> None:
        slot, start = piece.slot, piece.start
        assert self.lengths.get(slot, start) == start, "a token was skipped or computed twice"
        self.lengths[slot] = start + piece.num_tokens
        ids = piece.token_ids if piece.token_ids is not None else [self.last_ids[slot]]
        assert len(ids) == piece.num_tokens
        prefix = self.truths[self.owners[slot]][start - 1] if start else 0
        for position, token_id in enumerate(ids, start):
            prefix = extended(prefix, token_id)
            for kind in range(len(self.kinds)):
                place = self._place(kind, slot, position)
                assert place >= self.block_size, "the null block was written"
                self.cache[kind, place] = prefix

    def _read(self, piece: ScheduledPiece) -> int:
        """Looks at all that the piece attends to; the id that it samples, or -1."""
        truth, stop = self.truths[self.owners[piece.slot]], piece.start + piece.num_tokens
        for kind, spec in enumerate(self.kinds):
            first = 0 if spec.window is None else max(0, piece.start - spec.window + 1)
            for position in range(first, stop):
                seen = self.cache.get((kind, self._place(kind, piece.slot, position)))
                assert seen == truth[position], "a block was lost, or read stale"
        if not piece.samples:
            return -1
        self.last_ids[piece.slot] = next_id(truth[stop - 1])
        return self.last_ids[piece.slot]


class ReplayExecutor:
    """Stages with lags of their own; outputs in order, of which a free request's token may come with its
    next one instead. `wait` says at random that something else is to be done."""

    is_broken = False

    def __init__(
        self,
        pp_size: int,
        kinds: Sequence[CacheKind],
        block_size: int,
        truths: Sequence[list[Prefix]],
        random: Random,
        has_ended: Callable[[int], bool],
    ) -> None:
        """`has_ended(seed)`: nobody reads any more what that request is given."""
        self._stages = [_Stage(kinds, block_size, truths) for _ in range(pp_size)]
        self._random, self._has_ended = random, has_ended
        self._masks: dict[int, StepMasks] = {}
        self._outputs: dict[int, list[list[list[int]]]] = {}
        self._batches: deque[ScheduledBatch] = deque()
        self._late: dict[int, list[int]] = {}  # by slot
        self.max_in_flight = pp_size + 1

    def submit(self, batch: ScheduledBatch) -> None:
        self._batches.append(batch)
        assert len(self._batches) <= self.max_in_flight
        slots = [piece.slot for piece in batch.pieces]
        assert len(slots) == len(set(slots)), "a request is twice in one batch"
        for stage in self._stages:
            stage.queue.append(batch)
        for stage in self._stages:
            while stage.queue and self._can_run(stage) and self._random.random() < 0.5:
                self._run_one(stage)

    def _can_run(self, stage: _Stage) -> bool:
        batch = stage.queue[0]
        is_last = stage is self._stages[-1]
        return not (is_last and batch.masked_slots and batch.step_id not in self._masks)

    def _run_one(self, stage: _Stage) -> None:
        assert self._can_run(stage), "the step would wait for its masks for ever"
        batch = stage.queue.popleft()
        self._outputs.setdefault(batch.step_id, []).append(stage.run(batch))
        if stage is self._stages[-1] and batch.masked_slots:
            self._check_masks(stage, batch, self._masks.pop(batch.step_id))

    def _check_masks(self, stage: _Stage, batch: ScheduledBatch, masks: StepMasks) -> None:
        given = dict(zip(masks.slots, masks.masks, strict=True))
        assert list(given) == batch.masked_slots
        for piece in batch.pieces:
            if not piece.needs_mask:
                continue
            seed = stage.owners[piece.slot]
            expected = mask_behind(stage.truths[seed][piece.start + piece.num_tokens - 1])
            is_unread = given[piece.slot] == b"" and self._has_ended(seed)
            assert is_unread or given[piece.slot] == expected, "a mask of other tokens"

    def give_masks(self, masks: StepMasks) -> None:
        assert masks.step_id not in self._masks, "masks came twice"
        self._masks[masks.step_id] = masks

    def give_up(self) -> None:
        raise AssertionError("nothing is interrupted here")

    def wait(self, wake: int) -> bool:
        return self._random.random() < 0.7

    def collect(self) -> StepOutput:
        batch = self._batches.popleft()
        for stage in self._stages:
            while stage.queue and stage.queue[0].step_id <= batch.step_id:
                self._run_one(stage)
        outputs = self._outputs.pop(batch.step_id)
        assert all(output == outputs[0] for output in outputs), "stages differ"
        slots = batch.sampling_slots
        ids = [self._in_time(slot, new) for slot, new in zip(slots, outputs[0], strict=True)]
        return StepOutput(*batch.header, slots, ids)

    def _in_time(self, slot: int, new: list[int]) -> list[int]:
        """The ids that are told now: also those that came late, or none yet."""
        ids = self._late.pop(slot, []) + new
        if self._comes_again(slot) and self._random.random() < 0.3:
            self._late[slot] = ids
            return []
        return ids

    def _comes_again(self, slot: int) -> bool:
        """True if the slot's next id is under way, of the same request, and needs no mask."""
        for batch in self._batches:
            if any(setup.slot == slot for setup in batch.setups):
                return False
            for piece in batch.pieces:
                if piece.slot == slot:
                    return piece.samples and not piece.needs_mask
        return False
