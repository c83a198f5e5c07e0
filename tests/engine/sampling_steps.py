"""Steps of a `Sampler` without a model: the hidden states are the logits, cut like the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from bireme.engine.sampling.sampler import Sampler
from bireme.engine.sampling.shard import Shard
from bireme.parallel.mesh import Alone, TensorGroup
from bireme.request import (
    SamplingSetup,
    ScheduledBatch,
    ScheduledPiece,
    SlotSetup,
    StepHeader,
    StepMasks,
    StepOutput,
    asked_rows,
)
from thread_group import run_group

WORKSPACE = 64 * 1000  # a row of 1,000 logits
CPU = torch.device("cpu")


def shard_of(logits: torch.Tensor, shard: Shard) -> torch.Tensor:
    """One rank's padded part of [.., V], as the head gives it."""
    part = torch.full((*logits.shape[:-1], shard.width), -math.inf)
    part[..., : shard.num_real] = logits[..., shard.first_id : shard.first_id + shard.num_real]
    return part


def piece(
    slot: int, start: int, num_tokens: int = 1, *, samples: bool = True, needs_mask: bool = False
) -> ScheduledPiece:
    return ScheduledPiece(slot, start, num_tokens, None, [], samples, needs_mask)


def decodes(
    setups: Sequence[SamplingSetup], first: int, num_steps: int, max_len: int, step_id: int = 0
) -> list[ScheduledBatch]:
    """Slots that all have `first` tokens, the last of them new, and get `num_steps` more."""
    slots = [SlotSetup(slot, max_len, sampling) for slot, sampling in enumerate(setups)]
    return [
        ScheduledBatch(
            0,
            step_id + at,
            [] if at else slots,
            [piece(slot, first - 1 + at) for slot in range(len(setups))],
        )
        for at in range(num_steps)
    ]


def run_steps(
    table: torch.Tensor,
    batches: Sequence[ScheduledBatch],
    size: int,
    masks: Sequence[StepMasks] = (),
    workspace_bytes: int = WORKSPACE,
) -> list[StepOutput]:
    """What `size` ranks answer. table [slots, positions, V] holds the logits after each position."""

    def mask_of(header: StepHeader) -> StepMasks:
        return next(each for each in masks if (each.incarnation, each.step_id) == header)

    def work(rank: int, group: TensorGroup) -> tuple[list[list[int]], list[StepOutput | None]]:
        shard = Shard.of(table.shape[-1], size, rank, group)
        sampler = Sampler(lambda x: x, shard, mask_of, len(table), workspace_bytes, CPU)
        ids, outputs = [], []
        for batch in batches:
            rows = [table[p.slot, p.start : p.start + p.num_tokens] for p in batch.pieces]
            x = shard_of(torch.cat(rows), shard)
            sampler.set_up(batch.setups)
            chosen = None
            if batch.sampling_slots:
                chosen = sampler.choose(batch, x[asked_rows(batch.pieces)])
            ids.append(chosen.ids.tolist() if chosen is not None else [])
            answer = sampler.answer(batch, x, chosen, answers=rank == 0)
            outputs.append(None if answer is None else answer.output())
        return ids, outputs

    results = [work(0, Alone())] if size == 1 else run_group(size, work)
    assert all(ids == results[0][0] for ids, _ in results)
    assert all(output is None for _, outputs in results[1:] for output in outputs)
    return [output for output in results[0][1] if output is not None]


def tokens_of(outputs: Sequence[StepOutput]) -> list[list[int]]:
    """The ids of each slot, of outputs that all have every slot."""
    return [[output.token_ids[at][0] for output in outputs] for at in range(len(outputs[0].slots))]
