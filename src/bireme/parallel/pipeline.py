"""Stages, the partition of layers over them, the edges between them, and schedules, as data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf, isinf

from bireme.errors import CapacityError, ConfigError


@dataclass(frozen=True)
class StageSpec:
    """Layers [first_layer, last_layer) of the model, and which of its ends a stage holds."""

    stage: int
    first_layer: int
    last_layer: int
    has_embedding: bool
    has_head: bool


@dataclass(frozen=True)
class Edge:
    """A directed link between two ranks."""

    src: int
    dst: int


def stage_ranks(widths: Sequence[int]) -> tuple[range, ...]:
    """The ranks of each stage; ranks are numbered stage by stage."""
    starts = [0, *accumulate(widths)]
    return tuple(range(start, stop) for start, stop in pairwise(starts))


def edges_between(widths: Sequence[int], src: int, dst: int) -> tuple[Edge, ...]:
    """Stage `src` hands over to stage `dst`: receiver j takes from sender j * tp_src // tp_dst."""
    ranks = stage_ranks(widths)
    senders, receivers = ranks[src], ranks[dst]
    return tuple(
        Edge(senders[j * len(senders) // len(receivers)], receiver)
        for j, receiver in enumerate(receivers)
    )


def forward_edges(widths: Sequence[int]) -> tuple[Edge, ...]:
    """Hidden states: each stage to the next."""
    return tuple(
        edge for stage in range(len(widths) - 1) for edge in edges_between(widths, stage, stage + 1)
    )


def sampled_edges(widths: Sequence[int]) -> tuple[Edge, ...]:
    """Sampled ids: the last stage straight back to the first."""
    return edges_between(widths, len(widths) - 1, 0) if len(widths) > 1 else ()


StageCost = Callable[[int, int, int], float]  # of stage, first layer, and the one behind its last


def partition(
    layer_costs: Sequence[float],
    widths: Sequence[int],
    first_cost: float = 0.0,
    last_cost: float = 0.0,
    *,
    transfer_costs: Sequence[float] | None = None,
    fits: Callable[[int, int], bool] | None = None,
) -> tuple[int, ...]:
    """Layers a stage that minimise the slowest stage, exactly, by dynamic programming.

    A stage's cost is the sum over its layers, plus the embedding's on the first and the head's on
    the last, plus `transfer_costs[i]` at either side of a cut behind layer i, divided by its width.
    `fits(start, stop)` says whether a device holds these layers; CapacityError where no cut has
    only stages that fit.
    """
    num_layers, last = len(layer_costs), len(widths) - 1
    total = [0.0, *accumulate(layer_costs)]
    transfer = [0.0, *(transfer_costs or [0.0] * num_layers)]

    def cost(stage: int, start: int, stop: int) -> float:
        if fits is not None and start < stop and not fits(start, stop):
            return inf
        is_last = stage == last
        ends = first_cost * (stage == 0) + last_cost * is_last
        moved = transfer[start] * (stage > 0) + transfer[stop] * (not is_last)
        return (total[stop] - total[start] + ends + moved) / widths[stage]

    return partition_by(cost, num_layers, len(widths))


def partition_by(cost: StageCost, num_layers: int, num_stages: int) -> tuple[int, ...]:
    """`partition` for any cost of a stage: inf where it cannot be."""
    if num_stages > num_layers:
        raise ConfigError(
            f"pipeline_parallel_size={num_stages} exceeds the {num_layers} layers; use at most {num_layers}"
        )
    best = [cost(0, 0, stop) for stop in range(num_layers + 1)]
    cuts: list[list[int]] = []
    for stage in range(1, num_stages):
        row, cut = [inf] * (num_layers + 1), [0] * (num_layers + 1)
        for stop in range(stage + 1, num_layers + 1):
            options = [
                (max(best[start], cost(stage, start, stop)), start) for start in range(stage, stop)
            ]
            row[stop], cut[stop] = min(options)
        best, cuts = row, [*cuts, cut]
    if isinf(best[num_layers]):
        raise CapacityError(
            f"no cut of {num_layers} layers into {num_stages} stages fits the devices"
        )
    stops = [num_layers]
    for cut in reversed(cuts):
        stops.append(cut[stops[-1]])
    return tuple(stop - start for start, stop in pairwise([0, *reversed(stops)]))


@dataclass(frozen=True, slots=True, order=True)
class Action:
    """What a rank does at one time: the forward pass of a micro-batch through a stage, `2F0`."""

    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}F{self.micro_batch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        match = re.fullmatch(r"(\d+)F(\d+)", text)
        if match is None:
            raise ConfigError(
                f"{text!r} is no action; write stage 2, forward, micro-batch 0 as 2F0"
            )
        return cls(int(match[1]), int(match[2]))


Schedule = tuple[tuple[Action, ...], ...]  # of each rank, in its order


def forward_schedule(num_stages: int, num_micro_batches: int) -> Schedule:
    """Every rank holds one stage, and passes micro-batches through it in their order."""
    return tuple(
        tuple(Action(stage, micro_batch) for micro_batch in range(num_micro_batches))
        for stage in range(num_stages)
    )


def timeline(
    schedule: Schedule, cost: Callable[[Action], float]
) -> dict[Action, tuple[float, float]]:
    """When each action begins and ends: behind the one before it on its rank, and behind the same
    micro-batch on the stage before. ConfigError where the schedule waits for itself."""
    done: dict[Action, tuple[float, float]] = {}
    at = [0] * len(schedule)
    while any(index < len(actions) for index, actions in zip(at, schedule, strict=True)):
        before = len(done)
        for rank, actions in enumerate(schedule):
            while at[rank] < len(actions):
                action = actions[at[rank]]
                needed = Action(action.stage - 1, action.micro_batch)
                if action.stage > 0 and needed not in done:
                    break
                own = done[actions[at[rank] - 1]][1] if at[rank] else 0.0
                start = max(own, done[needed][1] if action.stage > 0 else 0.0)
                done[action] = start, start + cost(action)
                at[rank] += 1
        if len(done) == before:
            stuck = next(a[i] for i, a in zip(at, schedule, strict=True) if i < len(a))
            raise ConfigError(
                f"the schedule never comes to {stuck}: what it needs is not before it"
            )
    return done


def bubble_shares(
    schedule: Schedule, times: Mapping[Action, tuple[float, float]]
) -> tuple[float, ...]:
    """Of each rank, the share without work between the first action's start and the last one's end."""
    start = min(begun for begun, _ in times.values())
    elapsed = max(ended for _, ended in times.values()) - start
    busy = [sum(times[a][1] - times[a][0] for a in actions) for actions in schedule]
    return tuple(1 - seconds / elapsed for seconds in busy)


def grid(schedule: Schedule) -> str:
    """The schedule for people: a row a rank, a column a time in which every action takes one."""
    times = timeline(schedule, lambda _: 1.0)
    num_columns = int(max((end for _, end in times.values()), default=0))
    width = max((len(str(action)) for action in times), default=1)
    rows = []
    for rank, actions in enumerate(schedule):
        cells = ["."] * num_columns
        for action in actions:
            cells[int(times[action][0])] = str(action)
        rows.append(f"rank {rank}  " + " ".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(rows)


def stage_specs(layers_per_stage: Sequence[int], num_layers: int) -> tuple[StageSpec, ...]:
    """One spec a stage; ConfigError unless the counts are positive and sum to `num_layers`."""
    given = ",".join(map(str, layers_per_stage))
    if min(layers_per_stage) < 1:
        raise ConfigError(
            f"layers_per_stage {given} leaves a stage empty; give each at least 1 layer"
        )
    if sum(layers_per_stage) != num_layers:
        raise ConfigError(
            f"layers_per_stage {given} sums to {sum(layers_per_stage)}, but the model has {num_layers} layers"
        )
    stops = [0, *accumulate(layers_per_stage)]
    last = len(layers_per_stage) - 1
    return tuple(
        StageSpec(stage, start, stop, has_embedding=stage == 0, has_head=stage == last)
        for stage, (start, stop) in enumerate(pairwise(stops))
    )
