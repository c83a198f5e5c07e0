"""Leads a model through given tokens, prompts first and the rest one by one, and keeps its logits.

No step holds more than max_num_batched_tokens: what exceeds it is cut, as when serving.

Shapes: T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from bireme.engine.capture import capture_path
from bireme.engine.executor import WorkerExecutor, WorkerPlan
from bireme.kvcache.block_manager import BlockManager
from bireme.request import SamplingSetup, ScheduledBatch, ScheduledPiece, SlotSetup

Range = tuple[int, int, int]  # slot, and [start, stop) of its tokens


@dataclass(frozen=True)
class Sequences:
    """Token sequences, each with the length of its prompt."""

    ids: list[list[int]]
    num_prompt: list[int]

    @property
    def num_decode(self) -> int:
        return max(len(ids) - prompt for ids, prompt in zip(self.ids, self.num_prompt, strict=True))


@dataclass(frozen=True)
class Reference:
    """What a whole model computed: greedy continuations, and logits float32 [T, V] along them."""

    name: str
    sequences: Sequences
    logits: list[torch.Tensor]


def lead(
    executor: WorkerExecutor, plan: WorkerPlan, sequences: Sequences, folder: Path, *, probes: bool
) -> list[torch.Tensor]:
    """Logits float32 [T, V] of each sequence: its prompt, then token by token."""
    executor.capture(folder, probes=probes)
    batches = batches_of(sequences, plan)
    widths = plan.config.parallel.widths
    for index, batch in enumerate(batches):
        if index > len(widths):  # as many in flight as when serving
            executor.collect()
        executor.submit(batch)
    for _ in batches[: len(widths) + 1]:
        executor.collect()
    executor.capture(None)
    last = range(sum(widths) - widths[-1], sum(widths))
    rows: list[list[torch.Tensor]] = [[] for _ in sequences.ids]
    for batch in batches:
        parts = [_logits(capture_path(folder, batch.step_id, rank)) for rank in last]
        step_rows = torch.cat(parts, dim=-1).split([piece.num_tokens for piece in batch.pieces])
        for piece, logits in zip(batch.pieces, step_rows, strict=True):
            rows[piece.slot].append(logits)
    return [torch.cat(parts) for parts in rows]


def _logits(path: Path) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        logits: torch.Tensor = file.get_tensor("logits")
    return logits


def batches_of(sequences: Sequences, plan: WorkerPlan) -> list[ScheduledBatch]:
    """All prompts, then one given token of every unfinished sequence a turn."""
    maker = _Batches(plan, [len(ids) for ids in sequences.ids])
    prompts = [(slot, 0, num_prompt) for slot, num_prompt in enumerate(sequences.num_prompt)]
    batches = maker.of(sequences.ids, prompts)
    for done in range(sequences.num_decode):
        at = [(slot, num_prompt + done) for slot, num_prompt in enumerate(sequences.num_prompt)]
        turn = [(slot, start, start + 1) for slot, start in at if start < len(sequences.ids[slot])]
        batches += maker.of(sequences.ids, turn)
    return batches


def continue_greedily(
    executor: WorkerExecutor, plan: WorkerPlan, prompt: list[int], num_tokens: int
) -> list[int]:
    """The prompt and its greedy continuation of exactly `num_tokens`."""
    maker = _Batches(plan, [len(prompt) + num_tokens])
    ids, start = list(prompt), 0
    for _ in range(num_tokens):
        for batch in maker.of([ids], [(0, start, len(ids))]):
            executor.submit(batch)
            output = executor.collect()
        start = len(ids)
        ids.extend(output.token_ids[0])
    return ids


class _Batches:
    """Makes the batches of slots that are given their tokens; slot i grows to `max_lens[i]`."""

    def __init__(self, plan: WorkerPlan, max_lens: list[int]) -> None:
        self._blocks = BlockManager(plan.kinds, plan.config.block_size)
        self._max_tokens = plan.config.max_num_batched_tokens
        self._setups = [
            SlotSetup(slot, max_len, SamplingSetup(seed=0)) for slot, max_len in enumerate(max_lens)
        ]
        self._next_step_id = 0

    def of(self, ids: list[list[int]], ranges: list[Range]) -> list[ScheduledBatch]:
        """As many as are needed; each slot samples at the end of its range."""
        ends = {slot: stop for slot, _, stop in ranges}
        batches = []
        for step in self._cut(ranges):
            pieces = [
                ScheduledPiece(
                    slot=slot,
                    start=start,
                    num_tokens=stop - start,
                    token_ids=ids[slot][start:stop],
                    new_blocks=self._extended(slot, start, stop),
                    samples=stop == ends[slot],
                )
                for slot, start, stop in step
            ]
            setups = [self._setups[slot] for slot, start, _ in step if start == 0]
            batches.append(ScheduledBatch(0, self._next_step_id, setups, pieces))
            self._next_step_id += 1
        return batches

    def _extended(self, slot: int, start: int, stop: int) -> list[list[int]]:
        if start == 0:
            self._blocks.start(slot, [])
        return self._blocks.extend(slot, stop)

    def _cut(self, ranges: list[Range]) -> list[list[Range]]:
        """The same tokens in steps that are filled one after another."""
        steps: list[list[Range]] = []
        room = 0
        for slot, start, stop in ranges:
            while start < stop:
                if not room:
                    steps.append([])
                    room = self._max_tokens
                end = min(stop, start + room)
                steps[-1].append((slot, start, end))
                room -= end - start
                start = end
        return steps
