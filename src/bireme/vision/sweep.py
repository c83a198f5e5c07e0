"""The same batch in more and more micro-batches, on one device and over the stages."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from bireme.chrome_trace import Recorded
from bireme.config import format_bytes
from bireme.engine.messages import RankUsage
from bireme.engine.pool import WorkerPool
from bireme.errors import CapacityError
from bireme.parallel.mesh import Mesh
from bireme.vision.model import VisionModel
from bireme.vision.pipeline import Passed, RankSettings, VisionPipeline, micro_batch_sizes
from bireme.vision.plan import PipelinePlan, Work
from bireme.vision.predicted import Prediction, predict, stage_costs
from bireme.vision.tracing import Traced


@dataclass(frozen=True)
class Trial:
    """One number of micro-batches: what its largest rank needs, and the median of its runs, None where it
    does not fit; seconds of each run; what each rank held before the first, and behind the last. `recorded` is
    of the median run. `control`: logits of the same batch in other micro-batches, where no other trial has them."""

    num_micro_batches: int
    memory_bytes: int
    passed: Passed | None
    runs_s: tuple[float, ...] = ()
    usage: tuple[tuple[RankUsage, ...], tuple[RankUsage, ...]] = ((), ())
    recorded: Recorded = field(default_factory=lambda: Recorded((), ()))
    control: torch.Tensor | None = None

    @property
    def spread(self) -> float:
        """From the fastest run to the slowest, as a share of the median."""
        return (max(self.runs_s) - min(self.runs_s)) / self.passed.elapsed_s if self.passed else 0.0

    @property
    def images_per_s(self) -> float:
        return self.passed.images_per_s if self.passed else 0.0


@dataclass(frozen=True)
class Sweep:
    """All trials of one cut, what its ranks wrote, and the bytes of their weights."""

    trials: tuple[Trial, ...]
    recorded: Recorded
    weight_bytes: tuple[int, ...]

    @property
    def best(self) -> Trial | None:
        """The fastest; None where none fits."""
        ran = [trial for trial in self.trials if trial.passed is not None]
        return max(ran, key=lambda trial: trial.images_per_s, default=None)


def textbook_bubble(num_stages: int, num_micro_batches: int) -> float:
    """Of equal stages and free transfers: (p - 1) / (m + p - 1)."""
    return (num_stages - 1) / (num_micro_batches + num_stages - 1)


def work_of(
    model: VisionModel, batch: int, num_micro_batches: int, ring_depth: int | None = None
) -> Work:
    """With the largest of the micro-batches."""
    image_bytes = torch.Size(model.image_shape).numel() * model.torch_dtype.itemsize
    largest = micro_batch_sizes(batch, num_micro_batches)[0]
    return Work(batch=batch, micro_batch=largest, image_bytes=image_bytes, ring_depth=ring_depth)


def check_images_fit(model: VisionModel, batch: int, limit_bytes: int) -> None:
    """CapacityError before they are made, where the first stage cannot hold them, whatever the cut."""
    work, side = work_of(model, batch, 1), model.image_size
    if work.batch * work.image_bytes > limit_bytes:
        raise CapacityError(
            f"{batch} images of {side} x {side} alone take {format_bytes(work.batch * work.image_bytes)}, "
            f"more than the {format_bytes(limit_bytes)} of a device; use fewer or smaller ones"
        )


def with_micro_batches(plan: PipelinePlan, num_micro_batches: int) -> PipelinePlan:
    """The same cut; what it needs is for the largest of so many."""
    largest = micro_batch_sizes(plan.work.batch, num_micro_batches)[0]
    return dataclasses.replace(plan, work=dataclasses.replace(plan.work, micro_batch=largest))


def prediction_of(
    plan: PipelinePlan,
    timed_micro_batch: int,
    num_micro_batches: int,
    num_batches: int = 1,
    first_step: int = 0,
) -> Prediction:
    """Of a trial, from costs that were measured with `timed_micro_batch` images at once."""
    widths = (1,) * len(plan.stages)
    return predict(
        stage_costs(plan, timed_micro_batch),
        micro_batch_sizes(plan.work.batch, num_micro_batches) * num_batches,
        [Mesh(widths, rank).name for rank in range(len(widths))],
        first_step,
    )


def one_device(plan: PipelinePlan) -> PipelinePlan:
    """All blocks in one stage."""
    return dataclasses.replace(plan, blocks_per_stage=(len(plan.costs),))


@dataclass(frozen=True, kw_only=True)
class Sweeper:
    """Runs each number of micro-batches `num_runs` times, after one run that does not count; in a run
    `num_batches` follow one another."""

    model: VisionModel
    traced: Traced
    images: torch.Tensor
    counts: Sequence[int]
    limit_bytes: int | None = None
    num_batches: int = 1
    num_runs: int = 3
    pool: WorkerPool

    def sweep(
        self,
        plan: PipelinePlan,
        settings: RankSettings,
        done: Callable[[], None] = lambda: None,
        keep: Callable[[Recorded], None] = lambda recorded: None,
    ) -> Sweep:
        """`done` is called after each trial, `keep` gets the spans, of ranks that failed, too."""
        needs = {count: self._memory_bytes(plan, count) for count in self.counts}
        limit = self.limit_bytes
        fitting = [count for count, need in needs.items() if limit is None or need <= limit]
        trials = {count: Trial(count, need, None) for count, need in needs.items()}
        recorded = Recorded((), ())
        weight_bytes: tuple[int, ...] = ()
        if fitting:
            largest = micro_batch_sizes(len(self.images), min(fitting))[0]
            with VisionPipeline.open(
                self.model, self.traced, plan.blocks_per_stage, self.images, self.pool, settings,
                largest,
            ) as pipeline:  # fmt: skip
                weight_bytes = tuple(pipeline.weight_bytes)
                try:
                    for count in fitting:
                        trials[count] = self._try(pipeline, trials[count])
                        done()
                finally:
                    recorded = pipeline.recorded()
                    keep(recorded)
        for _ in range(len(needs) - len(fitting)):
            done()
        return Sweep(tuple(trials.values()), recorded, weight_bytes)

    def _memory_bytes(self, plan: PipelinePlan, num_micro_batches: int) -> int:
        return max(
            stage.memory_bytes for stage in with_micro_batches(plan, num_micro_batches).stages
        )

    def _try(self, pipeline: VisionPipeline, trial: Trial) -> Trial:
        """The same with its runs."""
        before, num_micro_batches = pipeline.usage(), trial.num_micro_batches
        pipeline.run(num_micro_batches)
        runs, parts = [], []
        for _ in range(self.num_runs):
            runs.append(pipeline.run(num_micro_batches, num_batches=self.num_batches))
            parts.append(runs[-1].part_of(pipeline.recorded(runs[-1].told_ns)))
        middle = statistics.median_low(run.elapsed_s for run in runs)
        median = next(index for index, run in enumerate(runs) if run.elapsed_s == middle)
        usage = before, pipeline.usage()
        return dataclasses.replace(
            trial,
            passed=runs[median],
            runs_s=tuple(run.elapsed_s for run in runs),
            usage=usage,
            recorded=parts[median],
            control=self._control(pipeline, num_micro_batches),
        )

    def _control(self, pipeline: VisionPipeline, num_micro_batches: int) -> torch.Tensor | None:
        """Of smaller micro-batches: a module that mixes images shows."""
        if len(self.counts) > 1 or num_micro_batches == len(self.images):
            return None
        return pipeline.run(num_micro_batches + 1).logits
