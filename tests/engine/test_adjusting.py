"""Biases, penalties, bans and masks: what a plain reference on the whole vocabulary does."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_steps import (
    CPU,
    WORKSPACE,
    decodes,
    piece,
    run_steps,
    shard_of,
    tokens_of,
)

from bireme.engine.sampling.adjusting import Adjustments
from bireme.engine.sampling.shard import Shard
from bireme.errors import EngineError
from bireme.parallel.mesh import Alone
from bireme.request import SamplingSetup, ScheduledBatch, SlotSetup, StepMasks

VOCAB = 150  # over three ranks of 64 columns: 64, 64 and 22 ids
MAX_LEN = 40


def reference(
    logits: torch.Tensor,
    sampling: SamplingSetup,
    said: Sequence[int],
    allowed: set[int] | None = None,
) -> torch.Tensor:
    """[V] after vLLM's adjustments, id by id."""
    values = logits.tolist()
    for id_, bias in sampling.logit_bias:
        values[id_] += bias
    for id_ in set(said):
        ratio = sampling.repetition_penalty
        values[id_] = values[id_] / ratio if values[id_] > 0 else values[id_] * ratio
    for id_, count in Counter(said[sampling.num_prompt :]).items():
        values[id_] -= sampling.frequency_penalty * count + sampling.presence_penalty
    banned = set(sampling.stop_ids) if len(said) < sampling.min_len else set()
    if allowed is not None:
        banned |= set(range(len(values))) - allowed
    return torch.tensor([-math.inf if id_ in banned else x for id_, x in enumerate(values)])


def mask_of(allowed: set[int], vocab: int = VOCAB) -> bytes:
    """Cut behind the last byte that allows anything."""
    bits = bytearray(-(-vocab // 8))
    for id_ in allowed:
        bits[id_ // 8] |= 1 << id_ % 8
    return bytes(bits).rstrip(b"\0")


ids = st.integers(0, VOCAB - 1)
SETUPS = st.builds(
    SamplingSetup,
    seed=st.integers(0, 2**63 - 1),
    temperature=st.sampled_from([0.0, 0.0, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.6, 1.7]),
    frequency_penalty=st.sampled_from([0.0, -0.8, 1.3]),
    presence_penalty=st.sampled_from([0.0, -0.4, 0.9]),
    logit_bias=st.dictionaries(ids, st.floats(-9, 9), max_size=8).map(lambda x: list(x.items())),
    min_len=st.integers(0, 20),
    stop_ids=st.lists(ids, max_size=5),
    num_prompt=st.just(8),
    token_ids=st.lists(st.integers(0, 12) | ids, min_size=9, max_size=20),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(SETUPS, min_size=1, max_size=5), st.integers(1, 4), st.integers(0, 2**31))
def test_every_shard_adjusts_its_part_as_the_plain_reference_does(
    setups: list[SamplingSetup], size: int, seed: int
) -> None:
    logits = torch.randn(len(setups), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    lengths = [len(sampling.token_ids) for sampling in setups]
    parts = []
    for rank in range(size):
        shard = Shard.of(VOCAB, size, rank, Alone())
        # two rows of penalties at once
        adjustments = Adjustments(shard, 2 * (8 * shard.width + 64 * max(lengths)), CPU)
        for slot, sampling in enumerate(setups):
            adjustments.set_up(SlotSetup(slot, MAX_LEN, sampling))
        part = shard_of(logits, shard)
        adjustments.apply(part, range(len(setups)), lengths)
        assert (part[:, shard.num_real :] == -math.inf).all()
        parts.append(part[:, : shard.num_real])
    expected = [
        reference(row, sampling, sampling.token_ids)
        for row, sampling in zip(logits, setups, strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), torch.stack(expected), rtol=1e-5, atol=1e-5)


def greedy(**asked: object) -> SamplingSetup:
    return SamplingSetup(seed=0, num_prompt=3, token_ids=[1, 2, 3], **asked)  # type: ignore[arg-type]


def table(num_slots: int = 2, seed: int = 0) -> torch.Tensor:
    """Logits after every position, alike enough from one to the next that penalties matter."""
    generator = torch.Generator().manual_seed(seed)
    same = torch.randn(num_slots, 1, VOCAB, generator=generator)
    return same * 2 + torch.randn(num_slots, MAX_LEN, VOCAB, generator=generator) * 0.3


@pytest.mark.parametrize("size", [1, 2, 3])
def test_penalties_follow_what_was_sampled(size: int) -> None:
    setups = [
        greedy(repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.3),
        greedy(frequency_penalty=0.2),
    ]
    logits = table()
    found = tokens_of(run_steps(logits, decodes(setups, 3, 20, MAX_LEN), size))
    for slot, sampling in enumerate(setups):
        said = list(sampling.token_ids)
        for position in range(3, 23):
            said.append(int(reference(logits[slot, position - 1], sampling, said).argmax()))
        assert found[slot] == said[3:]
    unpenalised = tokens_of(run_steps(logits, decodes([greedy(), greedy()], 3, 20, MAX_LEN), size))
    assert len(set(unpenalised[0])) < len(set(found[0]))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_preempted_request_goes_on_as_if_nothing_had_been(size: int, temperature: float) -> None:
    sampling = SamplingSetup(
        seed=5, temperature=temperature, repetition_penalty=1.4, frequency_penalty=0.5,
        num_prompt=3, token_ids=[1, 2, 3],
    )  # fmt: skip
    logits = table(1)
    whole = tokens_of(run_steps(logits, decodes([sampling], 3, 16, MAX_LEN), size))[0]
    back = SamplingSetup(
        seed=5, temperature=temperature, repetition_penalty=1.4, frequency_penalty=0.5,
        num_prompt=3, token_ids=[1, 2, 3, *whole[:7]],
    )  # fmt: skip
    again = [
        ScheduledBatch(0, 0, [SlotSetup(0, MAX_LEN, back)], [piece(0, 0, 6, samples=False)]),
        ScheduledBatch(0, 1, [], [piece(0, 6, 4)]),
        *[ScheduledBatch(0, 2 + at, [], [piece(0, 10 + at)]) for at in range(8)],
    ]
    rest = [ids for output in run_steps(logits, again, size) for ids in output.token_ids]
    assert [id_ for (id_,) in rest] == whole[7:]


def test_a_surplus_token_behind_the_end_of_a_slot_harms_nobody() -> None:
    sampling = greedy(frequency_penalty=1.0)
    outputs = run_steps(table(1), decodes([sampling], 3, 6, max_len=6), 1)
    expected = run_steps(table(1), decodes([sampling], 3, 3, max_len=30), 1)
    assert tokens_of(outputs)[0][:3] == tokens_of(expected)[0]


def test_a_slot_forgets_what_its_last_request_asked_for() -> None:
    everything = greedy(
        frequency_penalty=2.0, logit_bias=[(7, 99.0)], min_len=30, stop_ids=[4], num_logprobs=2,
        num_prompt_logprobs=1,
    )  # fmt: skip
    first, second = decodes([everything], 3, 5, MAX_LEN), decodes([greedy()], 3, 5, MAX_LEN, 5)
    outputs = run_steps(table(1), [*first, *second], 2)
    fresh = run_steps(table(1), decodes([greedy()], 3, 5, MAX_LEN), 2)
    assert tokens_of(outputs[5:]) == tokens_of(fresh)
    assert [(output.logprobs, output.prompt_logprobs) for output in outputs[5:]] == [([], [])] * 5


@pytest.mark.parametrize("size", [1, 2, 3])
def test_stop_ids_come_from_the_shortest_length_on_and_not_before(size: int) -> None:
    logits = table(1)
    logits[:, :, 70] = 50.0
    sampling = greedy(min_len=9, stop_ids=[70, 149])
    found = tokens_of(run_steps(logits, decodes([sampling], 3, 10, MAX_LEN), size))[0]
    assert [position for position, id_ in enumerate(found, start=3) if id_ == 70] == [9, 10, 11, 12]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sets(ids, min_size=1, max_size=9), min_size=1, max_size=4),
    st.integers(1, 4), st.sampled_from([0.0, 1.0, 5.0]), st.sampled_from([0, 3]),
    st.sampled_from([1.0, 0.8]), st.integers(0, 2**31),
)  # fmt: skip
def test_masked_slots_get_the_best_of_their_allowed_ids_and_others_what_they_get_anyway(
    allowed: list[set[int]], size: int, temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    logits = table(len(allowed) + 1, seed)
    setups = [
        SamplingSetup(seed=seed + slot, temperature=temperature, top_k=top_k, top_p=top_p)
        for slot in range(len(logits))
    ]
    (batch,) = decodes(setups, 3, 1, MAX_LEN)
    masked = [piece(slot, 2, needs_mask=slot > 0) for slot in range(len(logits))]
    slots = list(range(len(allowed), 0, -1))  # in whatever order they come
    masks = StepMasks(0, 0, slots, [mask_of(allowed[slot - 1]) for slot in slots])
    (free,) = run_steps(logits, [batch], 1)
    (found,) = run_steps(
        logits, [ScheduledBatch(0, 0, batch.setups, masked)], size, [masks], 3 * 16 * 64
    )
    assert found.token_ids[0] == free.token_ids[0]
    for slot, able in enumerate(allowed, start=1):
        (id_,) = found.token_ids[slot]
        assert id_ in able
        if temperature == 0:
            assert logits[slot, 2, id_] == max(logits[slot, 2, other] for other in able)


def test_masks_come_after_penalties_biases_and_the_ban() -> None:
    sampling = greedy(
        presence_penalty=-2.0, logit_bias=[(5, 90.0), (20, 3.0)], min_len=9, stop_ids=[21]
    )
    allowed = {20, 21, 22}
    logits = table(1)
    (batch,) = decodes([sampling], 3, 1, MAX_LEN)
    batch = ScheduledBatch(0, 0, batch.setups, [piece(0, 2, needs_mask=True)])
    masks = StepMasks(0, 0, [0], [mask_of(allowed)])
    (found,) = run_steps(logits, [batch], 2, [masks])
    expected = reference(logits[0, 2], sampling, sampling.token_ids, allowed)
    assert found.token_ids == [[int(expected.argmax())]]


def test_masks_that_lack_a_slot_are_an_error() -> None:
    (batch,) = decodes([greedy()], 3, 1, MAX_LEN)
    batch = ScheduledBatch(0, 0, batch.setups, [piece(0, 2, needs_mask=True)])
    with pytest.raises(EngineError, match="slot 0"):
        run_steps(table(1), [batch], 1, [StepMasks(0, 0, [1], [b"\xff"])])


def test_workspace_does_not_change_what_is_chosen() -> None:
    setups = [greedy(frequency_penalty=0.5, temperature=1.0, top_p=0.9)] * 4
    logits = table(4)
    roomy, tight = (
        tokens_of(run_steps(logits, decodes(setups, 3, 8, MAX_LEN), 2, workspace_bytes=size))
        for size in (WORKSPACE, 1)
    )
    assert roomy == tight
