"""Verification itself: steps within their limits, and no certificate for what was not compared."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bireme.engine.prepare
from bireme.checkpoint.prepared import PreparedModel, prepare_model
from bireme.config import EngineConfig, ParallelConfig
from bireme.engine.executor import WorkerPlan
from bireme.engine.pool import WorkerPool
from bireme.engine.prepare import DeviceMemory, make_plan
from bireme.errors import CapacityError
from bireme.request import ScheduledBatch, StepOutput
from bireme.verify import (
    Certificate,
    Reference,
    Sequences,
    certificate_json,
    certificate_name,
    certificate_text,
    uncut_reference,
    verify,
)
from bireme.verify.comparison import compare
from bireme.verify.sequences import batches_of, continue_greedily

MODEL: PreparedModel = prepare_model("demo")


def plan(max_num_batched_tokens: int = 7) -> WorkerPlan:
    return make_plan(
        MODEL,
        EngineConfig(dtype="float32", device="cpu", max_num_batched_tokens=max_num_batched_tokens),
    )


PLAN = plan()
SHAPES = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 5)), min_size=1, max_size=10)


class Ledger:
    """Takes batches in order: each token once, at its place, within the limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.ids: dict[int, list[int]] = {}
        self.batches: list[ScheduledBatch] = []

    def submit(self, batch: ScheduledBatch) -> None:
        assert batch.step_id == len(self.batches)
        assert 0 < batch.num_tokens <= self.limit
        for setup in batch.setups:
            assert setup.slot not in self.ids
            self.ids[setup.slot] = []
        for piece in batch.pieces:
            assert piece.start == len(self.ids[piece.slot])
            self.ids[piece.slot] += piece.token_ids or []
        self.batches.append(batch)

    def collect(self) -> StepOutput:
        slots = self.batches[-1].sampling_slots
        return StepOutput(0, len(self.batches) - 1, slots, [[7]] * len(slots))


@given(SHAPES)
def test_no_step_exceeds_its_limit_and_each_token_is_led_through_once(
    shapes: list[tuple[int, int]],
) -> None:
    ids = [list(range(prompt + decode)) for prompt, decode in shapes]
    ledger = Ledger(7)
    for batch in batches_of(Sequences(ids, [prompt for prompt, _ in shapes]), PLAN):
        ledger.submit(batch)
    assert list(ledger.ids.values()) == ids


def test_what_fits_is_one_step_for_the_prompts_and_one_a_token() -> None:
    batches = batches_of(Sequences([[1, 2, 3, 4], [5, 6, 7]], [2, 2]), PLAN)
    assert [batch.num_tokens for batch in batches] == [4, 2, 1]


def test_a_greedy_continuation_cuts_a_long_prompt_too() -> None:
    executor: Any = Ledger(7)
    prompt = list(range(17))
    assert continue_greedily(executor, PLAN, prompt, 3) == [*prompt, 7, 7, 7]
    assert [batch.num_tokens for batch in executor.batches] == [7, 7, 3, 1, 1]
    assert executor.ids == {0: [*prompt, 7, 7]}


def test_a_model_led_in_small_steps_is_the_same_model(pool: WorkerPool) -> None:
    config = EngineConfig(
        parallel=ParallelConfig.of(2, 2), dtype="float32", max_num_batched_tokens=5
    )
    prompts = [list(range(100, 123)), [7, 8], [9]]
    found = verify(MODEL, config, prompts, num_decode=4, pool=pool)
    assert found.is_same, certificate_text(found)
    assert (found.num_prefill_positions, found.num_decode_positions) == (26, 12)


def certificate(expected: torch.Tensor, found: torch.Tensor) -> Certificate:
    """Of one sequence of two prompt tokens and a decoded one."""
    reference = Reference("uncut", Sequences([[1, 2, 3]], [2]), [expected])
    return compare("m", PLAN, reference, [found])


LOGITS = torch.tensor([[1.0, 2.0, 4.0], [3.0, 1.0, 0.0], [0.0, 1.0, 5.0]])


def test_a_difference_within_the_tolerance_is_the_same_model() -> None:
    assert certificate(LOGITS, LOGITS + 1e-5).is_same
    assert not certificate(LOGITS, LOGITS + 1e-2).is_same


def test_a_small_difference_everywhere_is_not_excused_by_what_rounding_does_in_few_places() -> None:
    rounded = dataclasses.replace(PLAN, dtype="bfloat16")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(100, 100, generator=generator)
    one, all_ = logits.clone(), logits + 0.05
    one[7, logits[7].argmin()] += 0.4
    reference = Reference("uncut", Sequences([[1] * 100], [100]), [logits])
    assert compare("m", rounded, reference, [one]).is_same
    found = compare("m", rounded, reference, [all_])
    assert not found.is_same
    assert "5e-01 is allowed, and 5.0e-02 of 3e-02 on average" in certificate_text(found)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sides", [(True, False), (False, True), (True, True)])
def test_logits_that_are_no_numbers_are_never_the_same_model(
    bad: float, sides: tuple[bool, bool]
) -> None:
    spoilt = LOGITS.clone()
    spoilt[1, 2] = bad
    found = certificate(*(spoilt if is_bad else LOGITS for is_bad in sides))
    assert not found.is_same
    assert f"{sum(sides)} logits are NaN or infinite" in certificate_text(found)
    assert json.loads(certificate_json(found))["num_not_finite"] == sum(sides)


def test_where_all_logits_are_equal_no_difference_is_allowed() -> None:
    equal = torch.full((3, 3), 2.0)
    same, other = certificate(equal, equal.clone()), certificate(equal, equal + 1e-6)
    assert (same.is_same, other.is_same) == (True, False)
    for found in (same, other):
        assert "all logits of the reference are equal" in certificate_text(found)
    assert json.loads(certificate_json(other))["relative_difference"] is None


def test_certificates_of_different_comparisons_have_different_names() -> None:
    found = certificate(LOGITS, LOGITS)
    others = [
        {"reference": "transformers"},
        {"widths": (2,)},
        {"widths": (1, 1)},
        {"widths": (1, 1), "layers_per_stage": (3, 5)},
        {"dtype": "bfloat16"},
        {"device": "cuda"},
    ]
    names = {certificate_name(dataclasses.replace(found, **other)) for other in others}  # type: ignore[arg-type]
    assert certificate_name(found) == "certificate-uncut-tp1-layers8-float32-cpu.json"
    assert len(names - {certificate_name(found)}) == len(others)


CUT = EngineConfig(parallel=ParallelConfig.of(2), dtype="float32", device="cpu")


@pytest.fixture
def small_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds the rank of a demo model cut in two, and none all of it."""
    memory = DeviceMemory(80 << 20)
    monkeypatch.setattr(bireme.engine.prepare, "device_memory", lambda *_: memory)


@pytest.mark.usefixtures("small_devices")
def test_a_model_that_fits_no_single_device_is_compared_with_transformers(pool: WorkerPool) -> None:
    with pytest.raises(CapacityError, match=r"reference uncut .* or use reference transformers"):
        verify(MODEL, CUT, [[1, 2, 3]], num_decode=2, pool=pool)
    found = verify(MODEL, CUT, [[1, 2, 3]], num_decode=2, reference="transformers", pool=pool)
    assert found.is_same, certificate_text(found)
    assert found.departure_unknown is None


def test_a_cut_in_bfloat16_is_compared_with_one_rank_in_float32(pool: WorkerPool) -> None:
    prompts = [[1, 2, 3], [4, 5, 6, 7]]
    exact = dataclasses.replace(CUT, dtype="float32")
    reference = uncut_reference(MODEL, exact, prompts, num_decode=4)
    assert [len(ids) for ids in reference.sequences.ids] == [7, 8]
    same = verify(MODEL, exact, prompts, num_decode=4, reference=reference, pool=pool)
    rounded = dataclasses.replace(CUT, dtype="bfloat16")
    found = verify(MODEL, rounded, prompts, num_decode=4, reference=reference, pool=pool)
    assert same.is_same
    assert found.is_same
    assert same.relative_difference < 1e-4 < 1e-3 < found.relative_difference


@pytest.mark.usefixtures("small_devices")
def test_where_the_uncut_model_fits_no_device_a_certificate_says_that_the_place_is_unknown(
    pool: WorkerPool,
) -> None:
    logits = torch.randn(3, MODEL.config.vocab_size, generator=torch.Generator().manual_seed(0))
    other = Reference("other", Sequences([[1, 2, 3]], [3]), [logits])
    found = verify(MODEL, CUT, [[1, 2, 3]], num_decode=0, reference=other, pool=pool)
    assert (found.is_same, found.departure) == (False, None)
    assert "tp 1 x pp 1 needs" in str(found.departure_unknown)
    assert str(found.departure_unknown) in certificate_text(found).splitlines()[-1]
