"""The last layer makes the rows that are sampled alone: the same logits as where it makes all of them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import zoo
from harness import Checkpoints, engine_config
from local_world import LocalExecutor

from bireme.engine.prepare import make_plan
from bireme.kvcache.block_manager import BlockManager
from bireme.request import SamplingSetup, ScheduledBatch, ScheduledPiece, SlotSetup, StepOutput

PROMPT_LEN, CUTS = 21, [0, 5, 19, 20, 21]
NUM_NEW = 3


def told(
    checkpoints: Checkpoints, case: str, widths: tuple[int, ...], *, tells_prompt: bool
) -> tuple[list[StepOutput], list[int]]:
    """Of a prompt in chunks beside another one's new tokens; and how many rows the last layer made in each step."""
    plan = make_plan(checkpoints.model(case), engine_config(*widths))
    longest = max(zoo.prompts(), key=len)
    prompts = [longest[-2:], longest[:PROMPT_LEN]]
    prompt_logprobs = 0 if tells_prompt else None
    setups = [
        SlotSetup(
            slot, 40,
            SamplingSetup(
                seed=0, num_prompt=len(prompt), token_ids=prompt, num_logprobs=4,
                num_prompt_logprobs=prompt_logprobs if slot else None,
            ),
        )
        for slot, prompt in enumerate(prompts)
    ]  # fmt: skip
    blocks = BlockManager(plan.kinds, plan.config.block_size)
    for slot in range(2):
        blocks.start(slot, [])

    def piece(slot: int, start: int, stop: int) -> ScheduledPiece:
        size = len(prompts[slot])
        ids = prompts[slot][start:stop] if stop <= size else None
        return ScheduledPiece(
            slot, start, stop - start, ids, blocks.extend(slot, stop), stop >= size
        )

    executor, counts = LocalExecutor(plan), list[int]()
    *_, last = executor.runners[-1].model.layers.values()
    last.register_forward_hook(lambda _module, _given, made: counts.append(len(made)))
    outputs = []
    edges = [*pairwise(CUTS), *((PROMPT_LEN + at, PROMPT_LEN + at + 1) for at in range(NUM_NEW))]
    for step_id, (start, stop) in enumerate(edges):
        first = piece(0, step_id + 1, step_id + 2) if step_id else piece(0, 0, 2)
        pieces = [first, piece(1, start, stop)] if step_id != 1 else [piece(1, start, stop), first]
        executor.submit(ScheduledBatch(0, step_id, [] if step_id else setups, pieces))
        outputs.append(executor.collect())
    executor.close()
    return outputs, counts


@pytest.mark.parametrize("case", zoo.CASES)
@pytest.mark.parametrize("widths", [(1,), (2,), (1, 2)], ids=str)
def test_what_is_sampled_is_the_same(
    checkpoints: Checkpoints, case: str, widths: tuple[int, ...]
) -> None:
    some, counts = told(checkpoints, case, widths, tells_prompt=False)
    whole, all_counts = told(checkpoints, case, widths, tells_prompt=True)
    assert counts == [1, 1, 1, 2, 2, 2, 2]
    assert all_counts == [7, 15, 2, 2, 2, 2, 2]
    for one, other in zip(some, whole, strict=True):
        assert (one.slots, one.token_ids) == (other.slots, other.token_ids)
        for found, expected in zip(one.logprobs, other.logprobs, strict=True):
            assert [it.logprob for it in found] == pytest.approx(
                [it.logprob for it in expected], abs=1e-4
            )
