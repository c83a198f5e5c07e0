"""What a report shows of a vision pipeline: its sweep, and its run beside what the plan predicted."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import msgspec

from bireme.config import format_bytes
from bireme.observe.gantt import Gantt
from bireme.observe.pipeline_records import ImageThroughput, PipelineTrial, RunPlan, TrialRuns
from bireme.observe.run_records import ImageWorkload


class PlanData(msgspec.Struct, frozen=True, kw_only=True):
    """The bars that were predicted; `rows` of what, predicted, measured, and how far they are apart."""

    gantt: Gantt
    rows: list[list[str]]
    note: str


def plan_data(plan: RunPlan, measured: ImageThroughput) -> PlanData:
    assert plan.ledger.gantt is not None
    apart = [
        ["took", _ms(plan.elapsed_s), _ms(measured.elapsed_s),
         f"{measured.elapsed_s / plan.elapsed_s - 1:+.1%}"],
        ["images/s", f"{plan.images_per_s:.1f}", f"{measured.images_per_s:.1f}",
         f"{measured.images_per_s / plan.images_per_s - 1:+.1%}"],
    ]  # fmt: skip
    ranks = zip(plan.ledger.ranks, plan.bubbles, measured.bubbles, strict=True)
    for rank, predicted, found in ranks:
        name = rank.name.partition(" (")[0]
        difference = f"{100 * (found - predicted):+.1f} points"
        apart.append([f"bubble of {name}", f"{predicted:.1%}", f"{found:.1%}", difference])
    return PlanData(
        gantt=plan.ledger.gantt,
        rows=apart,
        note=f"Modelled: from blocks that were timed one by one with {plan.timed_micro_batch} images at once, as if "
        "twice the images took twice the time, and nothing but blocks and hand-overs took any.",
    )


def trial_rows(trials: Sequence[PipelineTrial]) -> list[list[str]]:
    """Micro-batches; images/s of one device, of the stages, and as predicted; bubbles as the mean of the ranks:
    measured, of the schedule, predicted, and the textbook's."""
    return [
        [
            str(trial.num_micro_batches),
            _rate(trial.one_device),
            _rate(trial.stages),
            f"{trial.predicted_images_per_s:.1f}",
            _mean(trial.bubbles),
            _mean(trial.schedule_bubbles),
            _mean(trial.predicted_bubbles),
            f"{trial.textbook_bubble:.1%}",
        ]
        for trial in trials
    ]


def image_figures(found: ImageThroughput, work: ImageWorkload) -> list[tuple[str, str]]:
    speed_up = "does not fit" if found.speed_up is None else f"{found.speed_up:.2f} x"
    return [
        ("images", f"{found.images_per_s:.1f} a second"),
        ("over one device", speed_up),
        ("took", _ms(found.elapsed_s)),
        ("bubble", _mean(found.bubbles)),
        ("micro-batches", str(work.num_micro_batches * work.num_batches)),
    ]


def image_workload(work: ImageWorkload) -> str:
    row = f", {work.num_batches} batches in a row" if work.num_batches > 1 else ""
    source = "made up" if work.folder is None else f"of {work.folder}"
    return (
        f"{work.batch} images of {work.image_size} x {work.image_size} in {work.num_micro_batches} micro-batches{row}, "
        f"{source}; the median of {work.num_runs} runs"
    )


def _rate(runs: TrialRuns) -> str:
    if runs.images_per_s is None:
        return f"needs {format_bytes(runs.memory_bytes)}"
    return f"{runs.images_per_s:.1f}"


def _mean(bubbles: Sequence[float]) -> str:
    return f"{fmean(bubbles):.1%}" if bubbles else "-"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"
