"""A vision pipeline's sweep as a run folder: the best trial's median run, and beside it what the plan said."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from bireme.bench.memory_kinds import stage_memory
from bireme.bench.run_facts import run_hardware
from bireme.chrome_trace import Recorded
from bireme.engine.setup import environment
from bireme.observe.exchanges import message_sizes
from bireme.observe.gantt import Gantt
from bireme.observe.ledger import Ledger, make_ledger
from bireme.observe.pipeline_records import (
    ImageThroughput,
    PipelineTrial,
    PlannedStage,
    RunPlan,
    TrialRuns,
)
from bireme.observe.profile_records import Profile, RankMemory
from bireme.observe.run_folder import RunFolder, write_run_folder
from bireme.observe.run_records import (
    ImageWorkload,
    RunAbout,
    RunLayout,
    RunLedger,
    RunModel,
    RunRank,
    RunSettings,
)
from bireme.observe.told import ToldLedger
from bireme.planning.probe import hardware
from bireme.planning.probe.driver import carrier
from bireme.planning.probe.probe import versions_of
from bireme.trace import SpanKind
from bireme.vision.model import VisionModel
from bireme.vision.pipeline import Passed, RankSettings
from bireme.vision.plan import PipelinePlan
from bireme.vision.predicted import stage_costs
from bireme.vision.sweep import Sweep, Trial, prediction_of, textbook_bubble, with_micro_batches

_MOST_BARS = 16_000  # of the predicted bars, whose number is that of the micro-batches


@dataclass(frozen=True)
class Begun:
    """When a command began, and how busy the machine was."""

    date: datetime = field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))
    start_s: float = field(default_factory=time.monotonic)
    load_average: float = field(default_factory=hardware.load_average)


@dataclass(frozen=True, kw_only=True)
class PipelineRun:
    """What `bireme pipeline` was asked for, the plan that it made, and both sweeps. `timed_micro_batch` images
    at once went into the plan's costs; `images` is a folder, None where they are made up."""

    command: Sequence[str]
    begun: Begun
    model: VisionModel
    num_parameters: int
    images: Path | None
    settings: RankSettings
    limit_bytes: int
    plan: PipelinePlan
    timed_micro_batch: int
    num_batches: int
    num_runs: int
    alone: Sweep
    staged: Sweep

    def write(self, folder: Path) -> RunFolder | None:
        """Into one that was prepared; None where no number of micro-batches fits."""
        best = self.staged.best
        if best is None or best.passed is None:
            return None
        recorded = best.recorded
        ledger = make_ledger(recorded)
        profile = self._profile(best, best.passed, recorded, ledger)
        plan = self._plan(best.num_micro_batches, best.passed.first_step)
        about = self._about(best.num_micro_batches)
        return write_run_folder(folder, about, recorded, RunLedger.of(ledger), profile, plan)

    def _about(self, num_micro_batches: int) -> RunAbout:
        devices, model, begun = self.settings.devices, self.model, self.begun
        return RunAbout(
            command=list(self.command),
            date=begun.date,
            elapsed_s=time.monotonic() - begun.start_s,
            versions=versions_of(devices),
            hardware=run_hardware(devices, begun.load_average),
            model=RunModel(
                name=model.name,
                folder=None if model.weights is None else str(Path(model.weights).absolute()),
                dtype=model.dtype,
                num_parameters=self.num_parameters,
            ),
            layout=self._layout(),
            workload=ImageWorkload(
                batch=self.plan.work.batch,
                image_size=model.image_size,
                num_micro_batches=num_micro_batches,
                num_batches=self.num_batches,
                num_runs=self.num_runs,
                folder=None if self.images is None else str(self.images.absolute()),
            ),
            settings=RunSettings(
                num_threads=self.settings.num_threads,
                transport=carrier(devices, self.settings.transport),
                environment=environment(),
                is_captured=self.settings.is_captured and devices[0].startswith("cuda"),
                memory_limit_bytes=self.limit_bytes,
            ),
        )

    def _layout(self) -> RunLayout:
        ranks = zip(
            self.plan.stages, self.staged.recorded.ranks, self.settings.devices, strict=True
        )
        return RunLayout(
            widths=(1,) * len(self.plan.stages),
            layers_per_stage=self.plan.blocks_per_stage,
            ranks=[
                RunRank(
                    rank=stage.stage,
                    name=rank.name,
                    stage=stage.stage,
                    tp_rank=0,
                    device=device,
                    layers=(stage.first, stage.last),
                )
                for stage, rank, device in ranks
            ],
        )

    def _profile(self, best: Trial, passed: Passed, recorded: Recorded, ledger: Ledger) -> Profile:
        num_steps = sum(span.kind is SpanKind.SUBMIT for span in recorded.engine)
        is_whole = all(
            sum(span.kind is SpanKind.STEP for span in rank.spans) == num_steps
            for rank in recorded.ranks
        )
        alone = self.alone.best
        return Profile(
            seconds=(ledger.end_ns - ledger.start_ns) / 1e9,
            num_steps=num_steps,
            is_whole=is_whole,
            throughput=ImageThroughput(
                elapsed_s=passed.elapsed_s,
                num_images=len(passed.logits),
                images_per_s=passed.images_per_s,
                bubbles=list(passed.bubbles),
                speed_up=None if alone is None else passed.images_per_s / alone.images_per_s,
            ),
            trials=[
                self._trial(*pair)
                for pair in zip(self.alone.trials, self.staged.trials, strict=True)
            ],
            messages=message_sizes(recorded, None),
            memory=self._memory(best),
            notes=[] if is_whole else ["the ranks' rings no longer held all of the run; try less"],
        )

    def _trial(self, alone: Trial, staged: Trial) -> PipelineTrial:
        num_micro_batches, passed = staged.num_micro_batches, staged.passed
        predicted = prediction_of(
            self.plan, self.timed_micro_batch, num_micro_batches, self.num_batches
        )
        return PipelineTrial(
            num_micro_batches=num_micro_batches,
            one_device=_runs(alone),
            stages=_runs(staged),
            bubbles=list(passed.bubbles) if passed else [],
            schedule_bubbles=list(passed.predicted_bubbles) if passed else [],
            predicted_bubbles=list(predicted.bubbles),
            predicted_images_per_s=self._num_images / predicted.elapsed_s,
            textbook_bubble=textbook_bubble(
                len(self.plan.stages), num_micro_batches * self.num_batches
            ),
        )

    @property
    def _num_images(self) -> int:
        return self.plan.work.batch * self.num_batches

    def _memory(self, best: Trial) -> list[RankMemory]:
        stages = with_micro_batches(self.plan, best.num_micro_batches).stages
        ranks = zip(stages, self.staged.weight_bytes, *best.usage, strict=True)
        return [
            stage_memory(
                stage.stage, weight_bytes, stage.memory_bytes - stage.parameter_bytes, before, after
            )
            for stage, weight_bytes, before, after in ranks
        ]

    def _plan(self, num_micro_batches: int, first_step: int) -> RunPlan:
        found = prediction_of(
            self.plan, self.timed_micro_batch, num_micro_batches, self.num_batches, first_step
        )
        ledger = make_ledger(found.recorded)
        stages = with_micro_batches(self.plan, num_micro_batches).stages
        return RunPlan(
            timed_micro_batch=self.timed_micro_batch,
            stages=[
                PlannedStage(
                    stage=stage.stage,
                    first=stage.first,
                    last=stage.last,
                    names=stage.names,
                    compute_s=cost.compute_s,
                    transfer_s=cost.receive_s + cost.send_s,
                    weight_bytes=stage.parameter_bytes,
                    memory_bytes=stage.memory_bytes,
                )
                for stage, cost in zip(
                    stages, stage_costs(self.plan, self.timed_micro_batch), strict=True
                )
            ],
            elapsed_s=found.elapsed_s,
            images_per_s=self._num_images / found.elapsed_s,
            bubbles=list(found.bubbles),
            ledger=ToldLedger.of(ledger, gantt=Gantt.of(ledger, _MOST_BARS)),
        )


def _runs(trial: Trial) -> TrialRuns:
    passed = trial.passed
    return TrialRuns(
        memory_bytes=trial.memory_bytes,
        elapsed_s=passed.elapsed_s if passed else None,
        images_per_s=passed.images_per_s if passed else None,
        runs_s=list(trial.runs_s),
    )
