"""What a run folder says of a vision pipeline alone: its part of `profile.json`, and its plan (`plan.json`).
Fields: docs/run-folder.md."""

from __future__ import annotations

import msgspec

from bireme.observe.told import ToldLedger


class ImageThroughput(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="images"):
    """Of the run that the trace is of, from the first forward's start to the last one's end; `bubbles`: each
    rank's share of that without work. `speed_up` over one device at its best, None where none fits."""

    elapsed_s: float
    num_images: int
    images_per_s: float
    bubbles: list[float]
    speed_up: float | None = None


class TrialRuns(msgspec.Struct, frozen=True, kw_only=True):
    """Some micro-batches on one device, or over the stages: what its largest rank needs by the plan, and the
    median run, None where that does not fit; seconds of each run."""

    memory_bytes: int
    elapsed_s: float | None = None
    images_per_s: float | None = None
    runs_s: list[float] = []


class PipelineTrial(msgspec.Struct, frozen=True, kw_only=True):
    """One number of micro-batches. Bubbles of each rank, empty where it does not fit: measured, of the schedule
    given how long each micro-batch took, and `predicted_bubbles` of the plan, as `predicted_images_per_s`.
    `textbook_bubble` is that of equal stages."""

    num_micro_batches: int
    one_device: TrialRuns
    stages: TrialRuns
    bubbles: list[float]
    schedule_bubbles: list[float]
    predicted_bubbles: list[float]
    predicted_images_per_s: float
    textbook_bubble: float


class PlannedStage(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks [`first`, `last`) of a stage, and the names of the first and the last of them; seconds are of one
    image: in its blocks, and to hand over at its ends. `memory_bytes`: what its tensors take at most."""

    stage: int
    first: int
    last: int
    names: tuple[str, str]
    compute_s: float
    transfer_s: float
    weight_bytes: int
    memory_bytes: int


class RunPlan(msgspec.Struct, frozen=True, kw_only=True):
    """`plan.json`: what the plan said of the run, from blocks that were timed one by one with
    `timed_micro_batch` images at once. `ledger` is made of predicted spans as a run's is of its own, its last
    steps being all of them."""

    timed_micro_batch: int
    stages: list[PlannedStage]
    elapsed_s: float
    images_per_s: float
    bubbles: list[float]
    ledger: ToldLedger
