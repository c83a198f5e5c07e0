"""Sampling without ever seeing the whole vocabulary on one rank."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sampling_steps import CPU, WORKSPACE, decodes, piece, run_steps, shard_of, tokens_of

from bireme.engine.sampling.choosing import RowGroup, _lowest_key, _Tempered, choose
from bireme.engine.sampling.columns import ChoiceKind, SlotColumns
from bireme.engine.sampling.sampler import Sampler
from bireme.engine.sampling.shard import Shard, sortable
from bireme.kernels.draws import Draws
from bireme.kernels.noise import gumbel_noise
from bireme.parallel.mesh import Alone
from bireme.request import SamplingSetup, SlotSetup, StepMasks
from thread_group import ThreadGroup, run_group

GREEDY = [RowGroup(slice(None), None)]


def draws(
    num: int,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
) -> list[RowGroup]:
    asked = Draws(
        temperature=torch.full((num,), temperature),
        top_k=torch.full((num,), top_k),
        top_p=torch.full((num,), top_p),
        min_p=torch.full((num,), min_p),
        seeds=torch.arange(num) + seed,
        choices=torch.arange(num) % 2,
        positions=torch.arange(num) * 3 + 1,
        has_top_k=top_k > 0,
        has_top_p=top_p < 1,
        has_min_p=min_p > 0,
    )
    return [RowGroup(slice(None), asked)] if temperature else GREEDY


def whole(logits: torch.Tensor, groups: list[RowGroup]) -> torch.Tensor:
    shard = Shard.of(logits.shape[1], 1, 0, Alone())
    return choose(shard_of(logits, shard), shard, groups, WORKSPACE)


def cut(logits: torch.Tensor, groups: list[RowGroup], size: int) -> list[torch.Tensor]:
    """What each of `size` ranks chooses."""

    def work(rank: int, group: ThreadGroup) -> torch.Tensor:
        shard = Shard.of(logits.shape[1], size, rank, group)
        return choose(shard_of(logits, shard), shard, groups, WORKSPACE)

    return run_group(size, work)


def kept(scaled: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """The plain way, float64 [V]: which ids min-p, top-k and then top-p leave."""
    scaled = scaled.double()
    keep = scaled >= scaled.max() + math.log(min_p) if min_p else torch.isfinite(scaled)
    if top_k:
        keep &= scaled >= scaled.sort(descending=True).values[min(top_k, len(scaled)) - 1]
    order = scaled.masked_fill(~keep, -math.inf).softmax(0).sort(descending=True)
    before = order.values.cumsum(0) - order.values
    return keep & (before < top_p)[order.indices.argsort()]


def test_greedy_is_the_first_best_id() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 3.0, 3.0, 1.0]])
    assert whole(logits, GREEDY).tolist() == [1, 0]


@given(st.sets(st.integers(0, 319), min_size=1), st.sampled_from([0.0, float("-inf")]))
def test_greedy_is_the_first_best_id_of_a_large_vocabulary(best: set[int], others: float) -> None:
    logits = torch.full((1, 320), others)
    logits[:, sorted(best)] = 1.0
    assert whole(logits, GREEDY).tolist() == [min(best)]


FILTERS = (
    st.sampled_from([0, 1, 5, 50]),
    st.sampled_from([0.1, 0.7, 0.95, 1.0]),
    st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(2, 400), st.integers(1, 5), st.sampled_from([0.0, 0.5, 1.0, 2.0]), *FILTERS,
    st.integers(0, 2**62), st.booleans(),
)  # fmt: skip
def test_the_draw_does_not_depend_on_how_the_vocabulary_is_cut(
    vocab: int, size: int, temperature: float, top_k: int, top_p: float, min_p: float, seed: int,
    is_sorted: bool,
) -> None:  # fmt: skip
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    if is_sorted:  # one shard has the likeliest of all, and others none that is likely
        logits = logits.sort(dim=1).values
    groups = draws(3, temperature, top_k, top_p, min_p, seed)
    expected = whole(logits, groups).tolist()
    for part in cut(logits, groups, size):
        assert part.tolist() == expected


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 400), st.sampled_from([0.5, 1.0, 2.0]), *FILTERS, st.integers(0, 2**31))
def test_the_draw_is_the_best_of_what_the_filters_keep_with_noise_added(
    vocab: int, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    groups = draws(3, temperature, top_k, top_p, min_p, seed)
    asked = groups[0].draws
    assert asked is not None
    noise = gumbel_noise(asked.seeds, asked.choices, asked.positions, torch.arange(vocab))
    scaled = logits / temperature
    keep, more, less = (
        torch.stack([kept(row, top_k, p, min_p) for row in scaled])
        for p in (top_p, min(1.0, top_p + 1e-5), top_p - 1e-5)
    )
    assume(torch.equal(more, keep) or top_p == 1)  # masses are integers of 2^-31
    assume(torch.equal(less, keep) or top_p == 1)
    expected = (scaled + noise).masked_fill(~keep, -math.inf).argmax(1)
    assert whole(logits, groups).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1.0, 0.0), (3, 1.0, 0.0), (0, 0.6, 0.0), (4, 0.8, 0.0), (0, 1.0, 0.3), (0, 0.7, 0.2)],
)
def test_draws_follow_the_filtered_distribution(top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.tensor([1.0, 2.5, 0.3, 2.0, -1.0, 1.5])
    num = 3_000
    drawn = whole(logits.expand(num, -1).contiguous(), draws(num, 0.8, top_k, top_p, min_p))
    scaled = logits / 0.8
    expected = scaled.masked_fill(~kept(scaled, top_k, top_p, min_p), -math.inf).softmax(0)
    found = drawn.bincount(minlength=6) / num
    assert (found[expected == 0] == 0).all()
    # five standard deviations of a binomial share
    assert (found - expected).abs().max() < 5 * math.sqrt(0.25 / num)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_rows_of_one_batch_may_ask_for_different_things(size: int) -> None:
    logits = torch.randn(4, 150, generator=torch.Generator().manual_seed(1))
    filtered, plain = draws(2, 1.0, 1)[0].draws, draws(1, 1.0)[0].draws
    groups = [
        RowGroup(torch.tensor([2]), None),
        RowGroup(torch.tensor([3, 0]), filtered),
        RowGroup(torch.tensor([1]), plain),
    ]
    best = logits.argmax(1)
    best[1] = whole(logits[1:2], draws(1, 1.0))[0]
    for part in cut(logits, groups, size):
        assert part.tolist() == best.tolist()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_slot_is_chosen_for_as_if_it_were_alone(size: int) -> None:
    asked: list[dict[str, float]] = [
        {}, {"choice": 1}, {"temperature": 0.0}, {"temperature": 2.0, "top_k": 3}, {"top_p": 0.5},
        {"min_p": 0.4}, {"temperature": 3.0}, {"top_k": 9, "top_p": 0.7, "min_p": 0.1},
    ]  # fmt: skip
    setups = [SamplingSetup(**{"seed": 2**40 + 3, "temperature": 1.0, **more}) for more in asked]  # type: ignore[arg-type]
    row = torch.randn(1, 60, 150, generator=torch.Generator().manual_seed(1))
    together = tokens_of(
        run_steps(row.expand(len(setups), -1, -1), decodes(setups, 3, 50, 60), size)
    )
    assert len({tuple(ids) for ids in together}) == len(setups)
    for sampling, found in zip(setups, together, strict=True):
        assert tokens_of(run_steps(row, decodes([sampling], 3, 50, 60), 1))[0] == found
        if sampling.temperature:
            keep = [
                kept(logits / sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
                for logits in row[0, 2:52]
            ]
            assert all(mask[id_] for mask, id_ in zip(keep, found, strict=True))


def test_rows_of_a_group_keep_their_slots_and_positions() -> None:
    columns = SlotColumns(4, torch.device("cpu"))
    temperatures = [1.0, 0.0, 2.0, 0.0]
    columns.set_up(
        [
            SlotSetup(slot, 9, SamplingSetup(seed=slot + 50, temperature=temperature))
            for slot, temperature in enumerate(temperatures)
        ]
    )
    slots, positions = torch.tensor([3, 2, 1, 0]), torch.tensor([5, 6, 7, 8])
    greedy, random = columns.groups(slots.tolist(), slots, positions)
    assert isinstance(greedy.rows, torch.Tensor)
    assert isinstance(random.rows, torch.Tensor)
    assert random.draws is not None
    assert (greedy.rows.tolist(), greedy.draws) == ([0, 2], None)
    assert random.rows.tolist() == [1, 3]
    assert random.draws.seeds.tolist() == [52, 50]
    assert random.draws.temperature.tolist() == [2.0, 1.0]
    assert random.draws.positions.tolist() == [6, 8]


def test_rows_of_all_kinds_are_drawn_as_their_slots_ask() -> None:
    """The last slot is of no request; a slot that is greedy now may have drawn before."""
    columns = SlotColumns(3, torch.device("cpu"))

    def set_up(slot: int, temperature: float, **filters: Any) -> None:
        asked = SamplingSetup(seed=slot + 50, temperature=temperature, **filters)
        columns.set_up([SlotSetup(slot, 9, asked)])

    set_up(0, 0.0)
    set_up(1, 2.0)
    assert columns.kind([0]) is ChoiceKind.GREEDY
    assert columns.kind([0, 1]) is ChoiceKind.RANDOM
    set_up(2, 1.0, top_p=0.5)
    assert columns.kind([2, 0, 1]) is ChoiceKind.TOP_P
    slots, positions = torch.tensor([3, 2, 1, 0]), torch.tensor([5, 6, 7, 8])
    assert columns.draws(ChoiceKind.GREEDY, slots, positions) is None
    random = columns.draws(ChoiceKind.RANDOM, slots, positions)
    assert random is not None
    assert not random.is_filtered
    found = columns.draws(ChoiceKind.TOP_P, slots, positions)
    assert found is not None
    assert (found.has_top_k, found.has_top_p, found.has_min_p) == (False, True, True)
    assert found.temperature.tolist() == [0.0, 1.0, 2.0, 0.0]
    assert found.seeds[1:3].tolist() == [52, 51]
    assert found.top_p[1:3].tolist() == [0.5, 1.0]
    assert found.positions is positions
    set_up(0, 1.0, top_k=3)
    assert columns.kind([2, 0, 1]) is ChoiceKind.TOP_K
    found = columns.draws(ChoiceKind.TOP_K, slots, positions)
    assert found is not None
    assert (found.has_top_k, found.has_top_p, found.has_min_p) == (True, True, True)
    assert found.top_k[1:].tolist() == [0, 0, 3]
    set_up(2, 0.0)
    set_up(0, 0.0)
    found = columns.draws(ChoiceKind.RANDOM, slots, positions)
    assert found is not None
    assert found.temperature.tolist() == [0.0, 0.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        ({}, ChoiceKind.GREEDY),
        ({"temperature": 0.5}, ChoiceKind.RANDOM),
        ({"temperature": 0.5, "min_p": 0.1}, ChoiceKind.TOP_P),
        ({"temperature": 0.5, "top_k": 9, "top_p": 0.1}, ChoiceKind.TOP_K),
        ({"top_k": 9}, ChoiceKind.GREEDY),
        ({"num_logprobs": 0}, None),
        ({"presence_penalty": 0.5}, None),
        ({"logit_bias": [(3, 1.0)]}, None),
        ({"min_len": 5, "stop_ids": [3]}, None),
        ({"min_len": 2, "stop_ids": [3]}, ChoiceKind.GREEDY),
    ],
)
def test_what_a_graph_can_choose(asked: dict[str, Any], kind: ChoiceKind | None) -> None:
    shard = Shard.of(150, 1, 0, Alone())
    sampler = Sampler(lambda x: x, shard, lambda _: StepMasks(0, 0, [], []), 2, 1000, CPU)
    setups = [SamplingSetup(seed=0), SamplingSetup(seed=0, **asked)]
    (batch,) = decodes(setups, 3, 1, 60)
    sampler.set_up(batch.setups)
    assert sampler.kind_alone(batch) is kind
    with_mask = msgspec.structs.replace(batch, pieces=[piece(0, 2), piece(1, 2, needs_mask=True)])
    unasked = msgspec.structs.replace(batch, pieces=[piece(0, 2), piece(1, 2, samples=False)])
    assert sampler.kind_alone(with_mask) is sampler.kind_alone(unasked) is None


@pytest.mark.parametrize("top_k", [0, 40])
def test_a_shard_without_a_single_allowed_id_is_not_chosen_from(top_k: int) -> None:
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(1))
    logits[:, :128] = -math.inf
    for groups in (GREEDY, draws(3, 2.0), draws(3, 2.0, top_k, 0.9, 0.01)):
        expected = whole(logits, groups)
        assert (expected >= 128).all()
        for part in cut(logits, groups, 3):
            assert part.tolist() == expected.tolist()


def test_choices_of_one_seed_are_drawn_apart() -> None:
    logits = torch.zeros(2, 1000)
    asked = draws(2, 1.0)[0].draws
    assert asked is not None
    same = dataclasses.replace(
        asked,
        seeds=torch.tensor([7, 7]),
        positions=torch.tensor([4, 4]),
        choices=torch.tensor([0, 1]),
    )
    first, second = whole(logits, [RowGroup(slice(None), same)]).tolist()
    assert first != second


def test_noise_is_gumbel_and_a_function_of_its_counters() -> None:
    seeds, zeros, positions = (
        torch.tensor([7, 7, 8]),
        torch.zeros(3, dtype=torch.int64),
        torch.tensor([1, 2, 1]),
    )
    ids = torch.arange(100_000)
    noise = gumbel_noise(seeds, zeros, positions, ids)
    assert torch.equal(noise[:, 500:600], gumbel_noise(seeds, zeros, positions, ids[500:600]))
    assert abs(float(noise.mean()) - 0.5772) < 0.01
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.02
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(float(torch.corrcoef(noise[[a, b]])[0, 1])) < 0.02
    # frozen: other devices and languages must draw the same
    assert gumbel_noise(seeds[:1], zeros[:1], positions[:1], torch.tensor([0, 1, 2000])).tolist()[
        0
    ] == pytest.approx(FROZEN, abs=1e-12)


FROZEN = [1.0528287100090419, -0.9353030824892812, -0.550060055338688]


@given(st.integers(0, 2**63 - 1), st.integers(0, 127), st.integers(0, 2**31), st.integers(0, 2**20))
def test_noise_is_the_hash_that_whole_numbers_give(
    seed: int, choice: int, position: int, id_: int
) -> None:
    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    low = mix(seed & 0xFFFFFFFF ^ mix(position))
    high = mix(seed >> 32 ^ mix(choice + 0x9E3779B9))
    word = mix(mix(id_ ^ low) + high & 0xFFFFFFFF)
    expected = -math.log(-math.log((word + 0.5) / 2**32))
    counters = [torch.tensor([value]) for value in (seed, choice, position, id_)]
    assert gumbel_noise(*counters).item() == pytest.approx(expected, rel=1e-12)


def test_a_row_that_does_not_filter_is_not_filtered_beside_one_that_does() -> None:
    """A token of 2^-40 of the likeliest one's share stays in the draw."""
    logits = torch.tensor([[0.0, -28.0], [0.0, -28.0]])
    asked = draws(2, 1.0, top_p=0.5)[0].draws
    assert asked is not None
    mixed = dataclasses.replace(asked, top_p=torch.tensor([1.0, 0.5]))
    lowest = _lowest_key(_Tempered(logits, slice(None), mixed.temperature, 2), mixed, Alone())
    assert (sortable(logits) >= lowest.unsqueeze(1)).tolist() == [[True, True], [True, False]]


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=20))
def test_keys_are_in_the_order_of_the_numbers_and_turn_back(values: list[float]) -> None:
    numbers = torch.tensor(values)
    keys = sortable(numbers)
    assert torch.equal(sortable(keys.view(torch.float32)).view(torch.float32), numbers)
    less = numbers.unsqueeze(1) < numbers.unsqueeze(0)
    assert (keys.unsqueeze(1) < keys.unsqueeze(0))[less].all()
