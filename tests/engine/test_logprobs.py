"""Log-probabilities of the model's own logits: those of torch.log_softmax at every cut."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_steps import decodes, piece, run_steps, tokens_of

from bireme.request import SamplingSetup, ScheduledBatch, SlotSetup, StepMasks, TokenLogprobs

VOCAB, MAX_LEN = 150, 30
# equal logits, of several ranks, are told by id
LEVELS = torch.tensor([-3.0, -0.0, 0.0, 1.5, 2.0])


def table(num_slots: int, seed: int, *, has_ties: bool = False, vocab: int = VOCAB) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if has_ties:
        return LEVELS[torch.randint(0, 5, (num_slots, MAX_LEN, vocab), generator=generator)]
    return torch.randn(num_slots, MAX_LEN, vocab, generator=generator) * 4


def assert_logprobs(found: TokenLogprobs, logits: torch.Tensor, id_: int, num_top: int) -> None:
    """What torch says of one row [V]."""
    expected = logits.double().log_softmax(0)
    order = sorted(range(len(logits)), key=lambda other: (-logits[other].item(), other))
    order = order[:num_top]
    assert found.rank == 1 + int((logits > logits[id_]).sum())
    assert found.top_ids == order
    assert found.logprob == pytest.approx(expected[id_].item(), abs=1e-12)
    assert found.top_logprobs == pytest.approx([expected[at].item() for at in order], abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.none() | st.integers(0, 20), min_size=1, max_size=4), st.integers(1, 4),
    st.sampled_from([0.0, 2.0]), st.booleans(), st.sampled_from([3, 70, VOCAB]), st.integers(0, 99),
)  # fmt: skip
def test_logprobs_of_new_tokens(
    counts: list[int | None], size: int, temperature: float, has_ties: bool, vocab: int, seed: int
) -> None:
    setups = [
        SamplingSetup(seed=slot, temperature=temperature, num_logprobs=count)
        for slot, count in enumerate(counts)
    ]
    logits = table(len(setups), seed, has_ties=has_ties, vocab=vocab)
    for step, output in enumerate(run_steps(logits, decodes(setups, 3, 3, MAX_LEN), size)):
        if counts == [None] * len(counts):
            assert output.logprobs == []
            continue
        for slot, count in enumerate(counts):
            told = output.logprobs[slot]
            assert len(told) == (count is not None)
            if count is not None:
                (id_,) = output.token_ids[slot]
                assert_logprobs(told[0], logits[slot, 2 + step], id_, count)


@pytest.mark.parametrize("size", [1, 3])
def test_logprobs_are_of_the_logits_before_everything(size: int) -> None:
    sampling = SamplingSetup(
        seed=3, temperature=0.3, top_k=4, repetition_penalty=2.0, frequency_penalty=1.0,
        logit_bias=[(id_, -50.0) for id_ in range(100)], min_len=20, stop_ids=[111],
        num_logprobs=5, num_prompt=3, token_ids=[1, 2, 3],
    )  # fmt: skip
    logits = table(1, 0)
    batches = decodes([sampling], 3, 4, MAX_LEN)
    batches[2] = ScheduledBatch(0, 2, [], [piece(0, 4, needs_mask=True)])
    masks = StepMasks(0, 2, [0], [b"\xff" * 14])
    outputs = run_steps(logits, batches, size, [masks])
    for step, output in enumerate(outputs):
        assert_logprobs(output.logprobs[0][0], logits[0, 2 + step], output.token_ids[0][0], 5)
    assert min(tokens_of(outputs)[0]) >= 100
    assert outputs[0].logprobs[0][0].rank > 1


def test_a_token_that_the_model_rules_out_has_a_logprob_of_minus_infinity() -> None:
    logits = torch.full((1, MAX_LEN, 70), -math.inf)
    logits[:, :, 3] = 2.0
    sampling = SamplingSetup(seed=0, num_prompt=3, token_ids=[3, 3, 69], num_prompt_logprobs=2)
    batch = ScheduledBatch(0, 0, [SlotSetup(0, MAX_LEN, sampling)], [piece(0, 0, 3)])
    (output,) = run_steps(logits, [batch], 2)
    told = output.prompt_logprobs[0].tokens
    assert [token.logprob for token in told] == [0.0, -math.inf]
    assert [token.rank for token in told] == [1, 2]
    assert told[0].top_ids == [3, 0]


def prompt_setup(slot: int, num_prompt: int, num_top: int | None, num_more: int = 0) -> SlotSetup:
    drawn = torch.Generator().manual_seed(slot)
    ids = torch.randint(0, VOCAB, (num_prompt + num_more,), generator=drawn).tolist()
    sampling = SamplingSetup(
        seed=0, num_prompt_logprobs=num_top, num_prompt=num_prompt, token_ids=ids
    )
    return SlotSetup(slot, MAX_LEN, sampling)


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(1, 3), st.sampled_from([1, 64 * 192 * 3, 10**7]))
def test_prompt_logprobs_in_chunks_are_those_of_the_whole_prompt(
    data: st.DataObject, size: int, workspace_bytes: int
) -> None:
    """Slot 0 does not ask; slots 1 and 2 do, in different chunks; slot 2 comes back with output."""
    setups = [
        prompt_setup(0, 12, None), prompt_setup(1, 12, 3), prompt_setup(2, 9, 0, num_more=3)
    ]  # fmt: skip
    cuts = [sorted({0, 12, *data.draw(st.sets(st.integers(1, 11), max_size=4))}) for _ in setups]
    logits = table(3, 1)
    batches = []
    for at in range(max(map(len, cuts)) - 1):
        pieces = [
            piece(slot, cut[at], cut[at + 1] - cut[at], samples=cut[at + 1] == 12)
            for slot, cut in enumerate(cuts)
            if at + 1 < len(cut)
        ]
        batches.append(ScheduledBatch(0, at, [] if at else setups, pieces))
    found: dict[int, list[TokenLogprobs]] = {1: [], 2: []}
    for output in run_steps(logits, batches, size, workspace_bytes=workspace_bytes):
        for part in output.prompt_logprobs:
            assert part.start == 1 + len(found[part.slot])
            found[part.slot] += part.tokens
    for slot, tokens in found.items():
        sampling = setups[slot].sampling
        assert len(tokens) == sampling.num_prompt - 1
        for position, told in enumerate(tokens):
            target = sampling.token_ids[position + 1]
            assert_logprobs(told, logits[slot, position], target, sampling.num_prompt_logprobs or 0)
