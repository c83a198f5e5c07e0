"""Stages, the partition of layers over them, and the edges between them, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from bireme.errors import ConfigError


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


def partition(
    layer_costs: Sequence[float],
    widths: Sequence[int],
    first_cost: float = 0.0,
    last_cost: float = 0.0,
) -> tuple[int, ...]:
    """Layers a stage that minimise the slowest stage, exactly, by dynamic programming.

    A stage's cost is the sum over its layers, plus the embedding's on the first and the head's on
    the last, divided by its width.
    """
    num_layers, num_stages = len(layer_costs), len(widths)
    if num_stages > num_layers:
        raise ConfigError(
            f"pipeline_parallel_size={num_stages} exceeds the {num_layers} layers; use at most {num_layers}"
        )
    total = [0.0, *accumulate(layer_costs)]

    def cost(stage: int, start: int, stop: int) -> float:
        ends = first_cost * (stage == 0) + last_cost * (stage == num_stages - 1)
        return (total[stop] - total[start] + ends) / widths[stage]

    best = [cost(0, 0, stop) for stop in range(num_layers + 1)]
    cuts: list[list[int]] = []
    for stage in range(1, num_stages):
        row, cut = [float("inf")] * (num_layers + 1), [0] * (num_layers + 1)
        for stop in range(stage + 1, num_layers + 1):
            options = [
                (max(best[start], cost(stage, start, stop)), start) for start in range(stage, stop)
            ]
            row[stop], cut[stop] = min(options)
        best, cuts = row, [*cuts, cut]
    stops = [num_layers]
    for cut in reversed(cuts):
        stops.append(cut[stops[-1]])
    return tuple(stop - start for start, stop in pairwise([0, *reversed(stops)]))


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
