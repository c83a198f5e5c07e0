"""The floating-point operations that are counted from layouts are those that torch is seen to make."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from harness import Checkpoints, engine_config
from local_world import LocalExecutor
from torch.utils.flop_counter import FlopCounterMode

from bireme.engine.prepare import make_plan
from bireme.models.registry import model_layout
from bireme.parallel.operations import rank_operations
from bireme.request import SamplingSetup, ScheduledBatch, ScheduledPiece, SlotSetup

NAMES = ("llama3", "gpt2", "opt", "opt-350m", "bloom", "gpt-neox", "gemma2", "phi3", "mixtral")
NUM_TOKENS = 11


@pytest.mark.parametrize("name", NAMES)
def test_products_are_as_torch_counts_them(name: str, checkpoints: Checkpoints) -> None:
    """Of a prompt, in float16, but for attention and experts: torch does not count packed and grouped
    products."""
    model = checkpoints.model(name)
    plan = make_plan(model, dataclasses.replace(engine_config(1), dtype="float16"))
    (runner,) = LocalExecutor(plan).runners
    setup = SlotSetup(0, NUM_TOKENS, SamplingSetup(seed=0))
    blocks = [[1, 2] for _ in plan.kinds]
    piece = ScheduledPiece(0, 0, NUM_TOKENS, list(range(NUM_TOKENS)), blocks, samples=True)
    with FlopCounterMode(display=False) as counter:
        runner.execute(ScheduledBatch(0, 1, [setup], [piece]))
    counts = counter.get_flop_counts()["Global"]
    products = sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    layout = model_layout(model.config, plan.config.parallel)
    counted = dataclasses.replace(
        rank_operations(model.config, layout, layout.ranks[0], 2),
        attention_width=0,
        expert_elements=0,
        asked_expert_elements=0,
    )
    assert counted.flop([piece]) == products
