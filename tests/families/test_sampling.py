"""Masks, penalties and log-probabilities through a whole model: the same answers at every layout."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import zoo
from harness import Checkpoints, engine_config
from local_world import LocalExecutor

from bireme.engine.prepare import make_plan
from bireme.kvcache.block_manager import BlockManager
from bireme.request import (
    SamplingSetup,
    ScheduledBatch,
    ScheduledPiece,
    SlotSetup,
    StepMasks,
    StepOutput,
    TokenLogprobs,
)

NUM_NEW = 8
ALLOWED = range(96, 104)  # of the second of four shards


def _run(
    checkpoints: Checkpoints, widths: tuple[int, ...], cuts: list[int], *, is_masked: bool = True
) -> list[StepOutput]:
    """Two prompts in the same chunks, then new tokens; the last one of slot 1 is masked."""
    plan = make_plan(checkpoints.model("qwen3"), engine_config(*widths))
    prompts = [prompt[:16] for prompt in zoo.prompts()[:2]]
    asked = [
        {"temperature": 0.9, "top_p": 0.9, "frequency_penalty": 0.7, "num_prompt_logprobs": 2},
        {"repetition_penalty": 1.3, "logit_bias": [(5, 3.0)], "num_logprobs": 3},
    ]
    setups = [
        SlotSetup(
            slot, 40, SamplingSetup(seed=slot, num_prompt=16, token_ids=prompts[slot], **more)
        )  # type: ignore[arg-type]
        for slot, more in enumerate(asked)
    ]
    blocks = BlockManager(plan.kinds, plan.config.block_size)
    for slot in range(2):
        blocks.start(slot, [])
    steps = [*pairwise([0, *cuts, 16]), *((16 + at, 17 + at) for at in range(NUM_NEW - 1))]
    executor = LocalExecutor(plan)
    if is_masked:
        bits = bytearray(ALLOWED.stop // 8)
        bits[ALLOWED.start // 8] = 0xFF
        executor.masks.append(StepMasks(0, len(steps) - 1, [1], [bytes(bits)]))
    for step_id, (start, stop) in enumerate(steps):
        pieces = [
            ScheduledPiece(
                slot, start, stop - start, prompts[slot][start:stop] if stop <= 16 else None,
                blocks.extend(slot, stop), stop >= 16,
                needs_mask=is_masked and slot == 1 and stop == steps[-1][1],
            )
            for slot in range(2)
        ]  # fmt: skip
        executor.submit(ScheduledBatch(0, step_id, setups if step_id == 0 else [], pieces))
    outputs = [executor.collect() for _ in steps]
    executor.close()
    return outputs


def _tokens(outputs: list[StepOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs if output.slots]  # type: ignore[misc]


def _assert_close(found: list[TokenLogprobs], expected: list[TokenLogprobs]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a.rank, a.top_ids) == (b.rank, b.top_ids)
        torch.testing.assert_close(
            torch.tensor([a.logprob, *a.top_logprobs]), torch.tensor([b.logprob, *b.top_logprobs]),
            rtol=0, atol=1e-3,
        )  # fmt: skip


@pytest.mark.parametrize("widths", [(2,), (3,), (1, 4), (2, 1), (3, 2)], ids=str)
@pytest.mark.parametrize("cuts", [[], [7, 8]], ids=str)
def test_what_is_sampled_and_told_does_not_depend_on_layout_or_chunks(
    checkpoints: Checkpoints, widths: tuple[int, ...], cuts: list[int]
) -> None:
    whole, found = _run(checkpoints, (1,), []), _run(checkpoints, widths, cuts)
    assert _tokens(found) == _tokens(whole)
    assert found[-1].token_ids[1][0] in ALLOWED
    prompts = [
        [token for output in outputs for part in output.prompt_logprobs for token in part.tokens]
        for outputs in (found, whole)
    ]
    assert len(prompts[0]) == 15
    _assert_close(*prompts)
    for told, expected in zip(found[-NUM_NEW:], whole[-NUM_NEW:], strict=True):
        assert told.logprobs[0] == []
        _assert_close(told.logprobs[1], expected.logprobs[1])


def test_what_is_asked_for_changes_what_is_sampled(checkpoints: Checkpoints) -> None:
    masked, free = (_run(checkpoints, (1,), [], is_masked=mask) for mask in (True, False))
    assert _tokens(masked)[:-1] == _tokens(free)[:-1]
    assert free[-1].token_ids[1][0] not in ALLOWED
