"""What a plan says of a run before it: when each rank would compute and hand over, from the measured costs of
its blocks. A micro-batch of twice the images takes twice the time, nothing else takes any, and a stage may
run ahead of the next as far as it likes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bireme.chrome_trace import Recorded
from bireme.parallel.pipeline import Action, Schedule, bubble_shares, forward_schedule, timeline
from bireme.trace import RankSpans, Span, SpanKind
from bireme.vision.plan import PipelinePlan


@dataclass(frozen=True)
class StageCost:
    """Seconds of one image: to take it from the stage before, to compute, to hand it over."""

    receive_s: float
    compute_s: float
    send_s: float

    @property
    def total_s(self) -> float:
        return self.receive_s + self.compute_s + self.send_s


@dataclass(frozen=True)
class Prediction:
    """When each action computes (seconds from when the ranks are told), and the same as the spans that ranks
    and their driver write."""

    schedule: Schedule
    times: dict[Action, tuple[float, float]]
    recorded: Recorded

    @property
    def elapsed_s(self) -> float:
        """From the first forward's start to the last one's end."""
        starts, ends = zip(*self.times.values(), strict=True)
        return float(max(ends) - min(starts))

    @property
    def bubbles(self) -> tuple[float, ...]:
        """Each rank's share of the elapsed time without work."""
        return bubble_shares(self.schedule, self.times)


def stage_costs(plan: PipelinePlan, timed_micro_batch: int) -> tuple[StageCost, ...]:
    """Of one image, from costs that were measured with so many at once."""
    moved = [0.0, *(plan.costs[stage.last - 1].transfer_s for stage in plan.stages[:-1]), 0.0]
    return tuple(
        StageCost(
            moved[stage.stage] / timed_micro_batch,
            stage.compute_s / timed_micro_batch,
            moved[stage.stage + 1] / timed_micro_batch,
        )
        for stage in plan.stages
    )


def predict(
    costs: Sequence[StageCost], sizes: Sequence[int], names: Sequence[str], first_step: int = 0
) -> Prediction:
    """Micro-batches of these sizes in their order, through one rank a stage of these names; micro-batch i is
    step `first_step + i`."""
    schedule = forward_schedule(len(costs), len(sizes))
    held = timeline(schedule, lambda it: costs[it.stage].total_s * sizes[it.micro_batch])
    times = {
        action: (
            start + costs[action.stage].receive_s * sizes[action.micro_batch],
            end - costs[action.stage].send_s * sizes[action.micro_batch],
        )
        for action, (start, end) in held.items()
    }
    ranks = [
        RankSpans(name, stage, 0, _spans(schedule[stage], held, times, first_step, len(costs)))
        for stage, name in enumerate(names)
    ]
    end_ns = max(_ns(end) for _, end in held.values())
    driver = [Span(SpanKind.SUBMIT, 0, 0, 0, first_step + at, 0) for at in range(len(sizes))]
    driver.append(Span(SpanKind.WAIT, 0, end_ns, 0, 0, 0))
    return Prediction(schedule, times, Recorded(ranks, driver))


def _spans(
    actions: Sequence[Action],
    held: dict[Action, tuple[float, float]],
    times: dict[Action, tuple[float, float]],
    first_step: int,
    num_stages: int,
) -> list[Span]:
    """Of one rank, which waits inside a step for what it is to take."""
    spans, free_ns = [], 0
    for action in actions:
        step = first_step + action.micro_batch
        start_ns, stop_ns = map(_ns, times[action])
        end_ns = _ns(held[action][1])
        spans.append(Span(SpanKind.STEP, free_ns, end_ns, 0, step, 0))
        if action.stage > 0:
            spans.append(Span(SpanKind.RECV, free_ns, start_ns, 0, step, 0))
        spans.append(Span(SpanKind.COMPUTE, start_ns, stop_ns, 0, step, 0))
        if action.stage < num_stages - 1:
            spans.append(Span(SpanKind.SEND, stop_ns, end_ns, 0, step, 0))
        free_ns = end_ns
    return spans


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
