"""Which blocks go where, and what is said where they cannot."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bireme.errors import CapacityError, ConfigError, RequestError
from bireme.vision.model import find_model
from bireme.vision.pipeline import micro_batch_sizes
from bireme.vision.plan import BlockCost, Work, make_plan, memory_bytes
from bireme.vision.tracing import trace
from bireme.vision.weights import materialise, open_weights

WORK = Work(batch=4, micro_batch=2, image_bytes=10)


def costs_of(sizes: list[int]) -> list[BlockCost]:
    return [BlockCost(f"layer{i}", 1.0, 0.0, size, 1, 3) for i, size in enumerate(sizes)]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.data())
def test_a_limit_is_refused_only_where_no_cut_fits_and_the_least_that_does_is_named(
    sizes: list[int], data: st.DataObject
) -> None:
    costs, num_stages = costs_of(sizes), data.draw(st.integers(1, len(sizes)))

    def largest(cuts: tuple[int, ...]) -> int:
        edges = (0, *cuts, len(sizes))
        return max(memory_bytes(costs, edges[i], edges[i + 1], WORK) for i in range(len(edges) - 1))

    least = min(largest(cuts) for cuts in combinations(range(1, len(sizes)), num_stages - 1))
    plan = make_plan(costs, num_stages, WORK, least)
    assert max(stage.memory_bytes for stage in plan.stages) <= least
    with pytest.raises(CapacityError, match=f"needs at least {least} B"):
        make_plan(costs, num_stages, WORK, least - 1)


def test_memory_is_weights_and_the_largest_moment_and_the_batch_at_either_end() -> None:
    costs = costs_of([100, 200])
    assert memory_bytes(costs, 0, 1, WORK) == 100 + 2 * 3 + 4 * 10
    assert memory_bytes(costs, 1, 2, WORK) == 200 + 2 * 3 + 4 * 1
    assert memory_bytes(costs, 0, 2, WORK) == 300 + 2 * 3 + 4 * 10 + 4 * 1


def test_gpus_keep_a_graphs_input_and_a_ring_at_each_end_of_an_edge_too() -> None:
    costs = [BlockCost(f"layer{i}", 1.0, 0.0, 100, out, 3) for i, out in enumerate((7, 5, 1))]
    work = replace(WORK, ring_depth=4)

    def kept(first: int, last: int) -> int:
        return memory_bytes(costs, first, last, work) - memory_bytes(costs, first, last, WORK)

    ring = 4 * 7  # of the largest result that any cut hands over
    assert kept(0, 1) == 2 * (10 + ring)
    assert kept(1, 2) == 2 * (7 + 2 * ring)
    assert kept(2, 3) == 2 * (5 + ring)
    assert kept(0, 3) == 2 * 10, "one device hands nothing over"


def test_given_cuts_are_kept_and_refused_where_a_stage_does_not_fit() -> None:
    costs = costs_of([10, 10, 100])
    assert make_plan(costs, 2, WORK, starts=[1]).blocks_per_stage == (1, 2)
    with pytest.raises(CapacityError, match="stage 1 needs 120 B, more than the 119 B"):
        make_plan(costs, 2, WORK, 119, starts=[1])
    with pytest.raises(ConfigError, match="in the order of the model"):
        make_plan(costs, 3, WORK, starts=[2, 1])


def test_more_stages_than_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="=3 exceeds the 2 blocks; use at most 2"):
        make_plan(costs_of([1, 1]), 3, WORK)


@pytest.mark.parametrize("name", ["resnet-18", "resnet-50", "vit-b16"])
def test_what_a_block_is_taken_to_need_is_what_its_tensors_take(name: str) -> None:
    """As torch's allocator tells of each block, on a CPU, where oneDNN lays out images anew too, in micro-batches of
    four."""
    model = find_model(None, name, image_size=64)
    module = model.build()
    traced = trace(module, model.image_shape, model.torch_dtype)
    weights = open_weights(model, module)
    for index, block in enumerate(traced.blocks):
        shape, dtype = traced.given_to(index)
        x = torch.zeros(4, *shape, dtype=dtype)
        taken = peak_bytes(materialise(block.module, weights, torch.device("cpu")), x) + x.nbytes
        needed = 4 * block.shape.peak_bytes + block.scratch_bytes
        assert 0.4 * needed < taken <= 1.5 * needed, (block.shape.name, taken, needed)


def peak_bytes(forward: nn.Module, x: torch.Tensor) -> int:
    """The most that lives at once of what it makes."""
    with (
        torch.inference_mode(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen,
    ):
        forward(x)
    events = [
        event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes), default=0)


def test_micro_batches_are_as_even_as_can_be() -> None:
    assert micro_batch_sizes(7, 3) == (3, 2, 2)
    assert micro_batch_sizes(4, 4) == (1, 1, 1, 1)
    with pytest.raises(RequestError, match="4 images cannot make 5 micro-batches; use at most 4"):
        micro_batch_sizes(4, 5)
