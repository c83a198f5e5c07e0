"""Which blocks go to which stage: by what each takes, under what a device holds."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from bireme.config import format_bytes
from bireme.errors import CapacityError, ConfigError
from bireme.parallel.pipeline import partition


@dataclass(frozen=True)
class BlockCost:
    """Of a micro-batch of the measurement: seconds, and those of a copy of its result on the same device, which
    stands for handing it over. Of one image:
    bytes of the result, and the most that lives at once. `scratch_bytes` are there for a moment whatever
    the number of images."""

    name: str
    compute_s: float
    transfer_s: float
    parameter_bytes: int
    out_bytes: int
    peak_bytes: int
    scratch_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be passed through: images in all, at once, and the bytes of one. `ring_depth` is
    that of `RankSettings`."""

    batch: int
    micro_batch: int
    image_bytes: int
    ring_depth: int | None = None


@dataclass(frozen=True)
class StagePlan:
    """Blocks [first, last) of a stage; seconds are of a micro-batch of the measurement, bytes of one
    of the plan."""

    stage: int
    first: int
    last: int
    names: tuple[str, str]
    compute_s: float
    transfer_s: float
    parameter_bytes: int
    out_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class PipelinePlan:
    """The cut, with what it was made from."""

    costs: tuple[BlockCost, ...]
    blocks_per_stage: tuple[int, ...]
    work: Work

    @cached_property
    def stages(self) -> tuple[StagePlan, ...]:
        stops = [0, *accumulate(self.blocks_per_stage)]
        return tuple(
            self._stage(stage, first, last) for stage, (first, last) in enumerate(pairwise(stops))
        )

    def _stage(self, stage: int, first: int, last: int) -> StagePlan:
        own, micro_batch = self.costs[first:last], self.work.micro_batch
        moved = [self.costs[at - 1].transfer_s for at in (first, last) if 0 < at < len(self.costs)]
        return StagePlan(
            stage,
            first,
            last,
            (own[0].name, own[-1].name),
            sum(cost.compute_s for cost in own),
            sum(moved),
            sum(cost.parameter_bytes for cost in own),
            own[-1].out_bytes * micro_batch,
            memory_bytes(self.costs, first, last, self.work),
        )


def memory_bytes(costs: Sequence[BlockCost], first: int, last: int, work: Work) -> int:
    """What the tensors of blocks [first, last) take at most: weights, the largest of their scratch and the
    largest moment of a micro-batch, the whole batch's images or logits at either end, and what a GPU keeps beside."""
    own = costs[first:last]
    ends = work.batch * work.image_bytes if first == 0 else 0
    if last == len(costs):
        ends += work.batch * own[-1].out_bytes
    weights = sum(cost.parameter_bytes for cost in own)
    of_one_image = max(cost.peak_bytes for cost in own) + _kept_bytes(costs, first, last, work)
    scratch = max(cost.scratch_bytes for cost in own)
    return weights + scratch + ends + work.micro_batch * of_one_image


def _kept_bytes(costs: Sequence[BlockCost], first: int, last: int, work: Work) -> int:
    """Of one image: the input of a CUDA graph, and rings of what any cut may hand over at most."""
    if work.ring_depth is None:
        return 0
    given = work.image_bytes if first == 0 else costs[first - 1].out_bytes
    num_edges = (first > 0) + (last < len(costs))
    largest = max((cost.out_bytes for cost in costs[:-1]), default=0)
    return given + num_edges * work.ring_depth * largest


def make_plan(
    costs: Sequence[BlockCost],
    num_stages: int,
    work: Work,
    limit_bytes: int | None = None,
    starts: Sequence[int] | None = None,
) -> PipelinePlan:
    """The cut whose slowest stage is fastest; `starts` are the first blocks of the later stages,
    where these are given. CapacityError where a stage is larger than its device."""
    check_num_stages(num_stages, len(costs))
    counts = _counts(starts, len(costs)) if starts is not None else None
    if counts is None:
        counts = _partition(costs, num_stages, work, limit_bytes)
    plan = PipelinePlan(tuple(costs), counts, work)
    for stage in plan.stages:
        if limit_bytes is not None and stage.memory_bytes > limit_bytes:
            raise CapacityError(
                f"stage {stage.stage} needs {format_bytes(stage.memory_bytes)}, more than the "
                f"{format_bytes(limit_bytes)} of a device; cut elsewhere, or leave --split out"
            )
    return plan


def check_num_stages(num_stages: int, num_blocks: int) -> None:
    """ConfigError where there are more stages than blocks."""
    if num_stages > num_blocks:
        raise ConfigError(
            f"pipeline_parallel_size={num_stages} exceeds the {num_blocks} blocks; "
            f"use at most {num_blocks}"
        )


def _counts(starts: Sequence[int], num_blocks: int) -> tuple[int, ...]:
    if list(starts) != sorted(set(starts)):
        raise ConfigError("the split points must be given once each, in the order of the model")
    return tuple(stop - start for start, stop in pairwise([0, *starts, num_blocks]))


def _partition(
    costs: Sequence[BlockCost], num_stages: int, work: Work, limit_bytes: int | None
) -> tuple[int, ...]:
    try:
        return partition(
            [cost.compute_s for cost in costs],
            [1] * num_stages,
            transfer_costs=[cost.transfer_s for cost in costs],
            fits=None if limit_bytes is None else _fits(costs, work, limit_bytes),
        )
    except CapacityError:
        assert limit_bytes is not None
    least = _least_limit(costs, num_stages, work)
    devices = "one device" if num_stages == 1 else f"{num_stages} devices"
    raise CapacityError(
        f"does not fit {devices} of {format_bytes(limit_bytes)}: the largest stage needs at least "
        f"{format_bytes(least)}; use more stages, or smaller micro-batches"
    )


def _fits(costs: Sequence[BlockCost], work: Work, limit_bytes: int) -> Callable[[int, int], bool]:
    return lambda first, last: memory_bytes(costs, first, last, work) <= limit_bytes


def _least_limit(costs: Sequence[BlockCost], num_stages: int, work: Work) -> int:
    """The least that every device must hold for any cut to fit: the first such size of all that a
    stage can have."""
    num_blocks = len(costs)
    sizes = sorted(
        {
            memory_bytes(costs, first, last, work)
            for first in range(num_blocks)
            for last in range(first + 1, num_blocks + 1)
        }
    )

    def is_enough(limit_bytes: int) -> bool:
        fits = _fits(costs, work, limit_bytes)
        try:
            partition([1.0] * num_blocks, [1] * num_stages, fits=fits)
        except CapacityError:
            return False
        return True

    return sizes[bisect_left(sizes, True, key=is_enough)]
