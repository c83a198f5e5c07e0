"""The last layer makes the rows that are sampled alone: the same logits as where it makes all of them."""

from __future__ import annotations

import dataclasses

import pytest
import zoo
from harness import Checkpoints, engine_config
from local_world import LocalExecutor

from bireme.engine.prepare import make_plan
from bireme.kvcache.block_manager import BlockManager
from bireme.request import SamplingSetup, ScheduledBatch, ScheduledPiece, SlotSetup, StepOutput

CUTS = [0, 4, 9, 23, 24, 25]  # of the second prompt
SIZES = [2, CUTS[-1], 3, 1]
# In what order the slots have their pieces; the first chunk is alone.
ORDERS = [[1], [0, 1, 2], [2, 1, 0, 3], [3, 2, 0, 1], [0, 1, 2, 3], [1, 0, 3, 2], [0, 1, 2, 3]]


def told(
    checkpoints: Checkpoints, case: str, widths: tuple[int, ...], *, tells_prompt: bool
) -> tuple[list[StepOutput], list[int]]:
    """Of a prompt in chunks beside other prompts and their new tokens; and how many rows the last layer made in each
    step."""
    plan = make_plan(
        checkpoints.model(case), dataclasses.replace(engine_config(*widths), max_num_seqs=4)
    )
    longest = max(zoo.prompts(), key=len)
    prompts = [longest[slot : slot + size] for slot, size in enumerate(SIZES)]
    setups = [
        SlotSetup(
            slot, 40,
            SamplingSetup(
                seed=0, num_prompt=len(prompt), token_ids=prompt, num_logprobs=4,
                num_prompt_logprobs=0 if tells_prompt and slot == 1 else None,
            ),
        )
        for slot, prompt in enumerate(prompts)
    ]  # fmt: skip
    blocks = BlockManager(plan.kinds, plan.config.block_size)
    for slot in range(len(SIZES)):
        blocks.start(slot, [])
    ends = [0] * len(SIZES)

    def piece(slot: int) -> ScheduledPiece:
        start, size = ends[slot], SIZES[slot]
        stop = start + 1 if start >= size else size
        if slot == 1 and start < size:
            stop = CUTS[CUTS.index(start) + 1]
        ends[slot] = stop
        ids = prompts[slot][start:stop] if start < size else None
        return ScheduledPiece(
            slot, start, stop - start, ids, blocks.extend(slot, stop), stop >= size
        )

    executor, counts = LocalExecutor(plan), list[int]()
    *_, last = executor.runners[-1].model.layers.values()
    last.register_forward_hook(lambda _module, _given, made: counts.append(len(made)))
    outputs = []
    for step_id, order in enumerate(ORDERS):
        pieces = [piece(slot) for slot in order]
        executor.submit(ScheduledBatch(0, step_id, [] if step_id else setups, pieces))
        outputs.append(executor.collect())
    executor.close()
    return outputs, counts


@pytest.mark.parametrize("case", zoo.CASES)
@pytest.mark.parametrize("widths", [(1,), (2,), (1, 2), (2, 2)], ids=str)
def test_what_is_sampled_is_the_same(
    checkpoints: Checkpoints, case: str, widths: tuple[int, ...]
) -> None:
    some, counts = told(checkpoints, case, widths, tells_prompt=False)
    whole, all_counts = told(checkpoints, case, widths, tells_prompt=True)
    assert counts == [1, 2, 3, 3, 4, 4, 4]
    assert all_counts == [4, 10, 17, 4, 4, 4, 4]
    assert [len(one.slots) for one in some] == [0, 2, 3, 3, 4, 4, 4]
    for one, other in zip(some, whole, strict=True):
        assert (one.slots, one.token_ids) == (other.slots, other.token_ids)
        for found, expected in zip(one.logprobs, other.logprobs, strict=True):
            assert [it.logprob for it in found] == pytest.approx(
                [it.logprob for it in expected], abs=1e-4
            )
