"""Leads a model through given tokens, prompts in one step and the rest one by one, and keeps its logits.

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
from bireme.request import ScheduledBatch, ScheduledPiece, SlotSetup


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
    """Logits float32 [T, V] of each sequence: its prompt in one step, then token by token."""
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
    """All prompts as the first step, then one given token of every unfinished sequence a step."""
    blocks = BlockManager(plan.num_blocks, plan.config.block_size)
    setups = [SlotSetup(slot, 0, 0.0, 0, 1.0, len(ids)) for slot, ids in enumerate(sequences.ids)]
    batches = []
    for step in range(sequences.num_decode + 1):
        pieces = []
        for slot, (ids, num_prompt) in enumerate(
            zip(sequences.ids, sequences.num_prompt, strict=True)
        ):
            start, stop = (
                (0, num_prompt) if step == 0 else (num_prompt + step - 1, num_prompt + step)
            )
            if stop <= len(ids):
                new = blocks.extend(slot, stop)
                pieces.append(
                    ScheduledPiece(slot, start, stop - start, ids[start:stop], [new], True)
                )
        batches.append(ScheduledBatch(0, step, setups if step == 0 else [], pieces))
    return batches


def continue_greedily(
    executor: WorkerExecutor, plan: WorkerPlan, prompt: list[int], num_tokens: int
) -> list[int]:
    """The prompt and its greedy continuation of exactly `num_tokens`."""
    blocks = BlockManager(plan.num_blocks, plan.config.block_size)
    ids = list(prompt)
    for step in range(num_tokens):
        start = 0 if step == 0 else len(ids) - 1
        new = blocks.extend(0, len(ids))
        piece = ScheduledPiece(0, start, len(ids) - start, ids[start:], [new], True)
        setups = [SlotSetup(0, 0, 0.0, 0, 1.0, len(prompt) + num_tokens)] if step == 0 else []
        executor.submit(ScheduledBatch(0, step, setups, [piece]))
        ids.extend(executor.collect().token_ids[0])
    return ids
