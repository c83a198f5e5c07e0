"""What `bireme pipeline` prints: the plan before the run, the sweep after it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bireme.chrome_trace import Recorded, chrome_trace
from bireme.cli.ledger import LABEL_WIDTH, show
from bireme.cli.tables import console, table
from bireme.config import format_bytes
from bireme.observe.ledger import make_ledger
from bireme.observe.told import NUM_COLUMNS, ToldLedger
from bireme.parallel.pipeline import forward_schedule, grid
from bireme.vision.agreement import allowed_difference, differences
from bireme.vision.model import VisionModel
from bireme.vision.pipeline import Passed, RankSettings
from bireme.vision.plan import PipelinePlan
from bireme.vision.predicted import Prediction
from bireme.vision.sweep import Sweep, Trial, prediction_of, textbook_bubble

_GRID_COLUMNS = 12  # micro-batches that fit a terminal's width


def write_trace(path: Path, recorded: Recorded) -> None:
    path.write_text(json.dumps(chrome_trace(recorded)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _at(trial: Trial) -> str:
    plural = "" if trial.num_micro_batches == 1 else "es"
    return f"{trial.num_micro_batches} micro-batch{plural}, {trial.images_per_s:.1f} images/s"


@dataclass(frozen=True)
class Report:
    """Of one model, one batch and the numbers of micro-batches that were tried."""

    model: VisionModel
    names: list[str]
    counts: Sequence[int]
    num_batches: int
    ranks: RankSettings
    limit_bytes: int
    top: int
    timed_micro_batch: int  # images at once, of which the plan's costs are

    @property
    def allowed(self) -> float:
        return allowed_difference(self.model.dtype, self.ranks.devices[0])

    def print_plan(self, plan: PipelinePlan) -> None:
        out, work = console(), plan.work
        weights = self.model.weights or "made up"
        num_threads = self.ranks.num_threads
        out.print(
            f"{self.model.name}: {len(plan.costs)} blocks in {len(plan.stages)} stages on "
            f"{', '.join(self.ranks.devices)} ({num_threads} thread{'s' * (num_threads > 1)} each), "
            f"{self.model.dtype}, weights {weights}\n"
            f"{self._images(work.batch)}; times are of "
            f"micro-batches of {self.timed_micro_batch}, memory of {work.micro_batch}; a transfer is taken to cost "
            f"what a copy on {self.ranks.devices[0]} does",
            highlight=False,
        )
        rows = table(
            "stage", "blocks", "from", "to", "compute", "transfer", "weights", "hands over", "memory"
        )  # fmt: skip
        for stage in plan.stages:
            rows.add_row(
                str(stage.stage),
                str(stage.last - stage.first),
                *stage.names,
                f"{stage.compute_s * 1e3:.1f} ms",
                f"{stage.transfer_s * 1e3:.2f} ms",
                format_bytes(stage.parameter_bytes),
                format_bytes(stage.out_bytes),
                format_bytes(stage.memory_bytes),
            )
        out.print(rows)
        shown = max((it for it in self.counts if it <= _GRID_COLUMNS), default=None)
        if shown is not None:
            out.print(grid(forward_schedule(len(plan.stages), shown)) + "\n", highlight=False)

    def print_blocks(self, plan: PipelinePlan, as_json: bool) -> None:
        """Every block that a stage can begin with, and what it costs."""
        if as_json:
            print(json.dumps(self._facts(plan), indent=1))
            return
        rows = table("block", "compute", "transfer", "weights", "hands over", "stage")
        stages = [stage.stage for stage in plan.stages for _ in range(stage.first, stage.last)]
        for cost, stage in zip(plan.costs, stages, strict=True):
            rows.add_row(
                cost.name,
                f"{cost.compute_s * 1e3:.2f} ms",
                f"{cost.transfer_s * 1e3:.2f} ms",
                format_bytes(cost.parameter_bytes),
                format_bytes(cost.out_bytes * plan.work.micro_batch),
                str(stage),
            )
        console().print(rows)
        self.print_plan(plan)

    def _images(self, batch: int) -> str:
        side = self.model.image_size
        row = f", {self.num_batches} batches in a row" if self.num_batches > 1 else ""
        return f"{batch} images of {side} x {side}{row}"

    def _textbook(self, num_stages: int, trial: Trial) -> float:
        return textbook_bubble(num_stages, trial.num_micro_batches * self.num_batches)

    def print_sweep(self, plan: PipelinePlan, alone: Sweep, staged: Sweep) -> None:
        out, num_stages = console(), len(plan.stages)
        rows = table(
            "micro-batches", "one device", f"{num_stages} stages", "speed-up", "bubble",
            "of the schedule", "(p-1)/(m+p-1)",
        )  # fmt: skip
        reference = alone.best
        for one, trial in zip(alone.trials, staged.trials, strict=True):
            rows.add_row(
                str(trial.num_micro_batches),
                self._rate(one),
                self._rate(trial),
                _speed_up(trial, reference),
                _share(trial.passed.bubbles) if trial.passed else "",
                _share(trial.passed.predicted_bubbles) if trial.passed else "",
                f"{self._textbook(num_stages, trial):.1%}",
            )
        out.print(rows)
        for line in self._conclusions(plan, alone, staged):
            out.print(line, highlight=False)
        for line in self._top_lines(staged):
            out.print(line, highlight=False, markup=False)

    def _rate(self, trial: Trial) -> str:
        if trial.passed is None:
            return f"does not fit: {format_bytes(trial.memory_bytes)}"
        spread = f" ±{trial.spread / 2:.0%}" if len(trial.runs_s) > 1 else ""
        return f"{trial.images_per_s:.1f} images/s{spread}"

    def _conclusions(self, plan: PipelinePlan, alone: Sweep, staged: Sweep) -> list[str]:
        limit, num_stages = format_bytes(self.limit_bytes), len(self.ranks.devices)
        one, best = alone.best, staged.best
        lines = []
        if one is None:
            least = format_bytes(min(trial.memory_bytes for trial in alone.trials))
            does = (
                f", fits {num_stages}; what it computes is compared with no other" if best else ""
            )
            lines.append(f"does not fit one device of {limit} (needs {least}){does}")
        else:
            lines.append(f"speed-up is over one device at its best: {_at(one)}")
        if best is None:
            return [*lines, f"no number of micro-batches fits {num_stages} devices of {limit}"]
        beside = f", {_speed_up(best, one)} one device" if one else ""
        lines.append(f"best: {_at(best)}{beside}")
        if best.passed is not None:
            lines.append(self._beside_the_plan(plan, best, best.passed))
        if one is not None:
            _, difference, largest = max(differences(alone, staged), key=lambda it: it[1])
            lines.append(
                f"largest difference to one device: {difference:.1e}, of logits up to {largest:.1e} "
                f"({self.allowed * largest:.1e} is allowed)"
            )
        return lines

    def _predicted(self, plan: PipelinePlan, trial: Trial) -> Prediction:
        return prediction_of(
            plan, self.timed_micro_batch, trial.num_micro_batches, self.num_batches
        )

    def _beside_the_plan(self, plan: PipelinePlan, best: Trial, passed: Passed) -> str:
        found = self._predicted(plan, best)
        return (
            f"predicted from the plan: {found.elapsed_s * 1e3:.1f} ms, bubble {_share(found.bubbles)}; measured: "
            f"{passed.elapsed_s * 1e3:.1f} ms ({passed.elapsed_s / found.elapsed_s - 1:+.1%}), "
            f"bubble {_share(passed.bubbles)}"
        )

    def _top_lines(self, staged: Sweep) -> list[str]:
        width = max(map(len, self.names), default=0)
        return [
            f"{name:<{width}}  " + ", ".join(f"{label} {share:.1%}" for label, share in best)
            for name, best in self._top(staged)
        ]

    def _top(self, staged: Sweep) -> list[tuple[str, list[tuple[str, float]]]]:
        """Of each image of a folder, its most likely classes."""
        if staged.best is None or staged.best.passed is None or not self.names:
            return []
        logits, labels = staged.best.passed.logits[: len(self.names)], self.model.labels
        found = logits.softmax(-1).topk(min(self.top, logits.shape[1]))
        return [
            (
                name,
                [
                    (labels.get(index, f"class {index}"), share)
                    for index, share in zip(indices, shares, strict=True)
                ],
            )
            for name, indices, shares in zip(
                self.names, found.indices.tolist(), found.values.tolist(), strict=True
            )
        ]

    def print_json(self, plan: PipelinePlan, alone: Sweep, staged: Sweep) -> None:
        one, best = alone.best, staged.best
        found = self._facts(plan) | {
            "one_device": [self._trial(alone, trial) for trial in alone.trials],
            "pipeline": [self._trial(staged, trial) for trial in staged.trials],
            "best_micro_batches": best.num_micro_batches if best else None,
            "predicted_by_plan": self._prediction_facts(plan, best) if best else None,
            "speed_up": best.images_per_s / one.images_per_s if best and one else None,
            "largest_difference": max(
                (it for _, it, _ in differences(alone, staged)), default=None
            ),
            "allowed_difference": self.allowed,
            "top": {
                name: [{"label": label, "share": share} for label, share in classes]
                for name, classes in self._top(staged)
            },
        }
        print(json.dumps(found, indent=1))

    def _prediction_facts(self, plan: PipelinePlan, best: Trial) -> dict[str, Any]:
        found = self._predicted(plan, best)
        return {"elapsed_s": found.elapsed_s, "bubbles": found.bubbles}

    def _facts(self, plan: PipelinePlan) -> dict[str, Any]:
        """Before anything ran."""
        return {
            "model": self.model.name,
            "dtype": self.model.dtype,
            "image_size": self.model.image_size,
            "batch": plan.work.batch,
            "batches": self.num_batches,
            "is_captured": self.ranks.is_captured,
            "devices": self.ranks.devices,
            "num_threads": self.ranks.num_threads,
            "memory_limit_bytes": self.limit_bytes,
            "blocks": [asdict(cost) for cost in plan.costs],
            "plan": [asdict(stage) for stage in plan.stages],
        }

    def _trial(self, sweep: Sweep, trial: Trial) -> dict[str, Any]:
        found: dict[str, Any] = {
            "micro_batches": trial.num_micro_batches,
            "memory_bytes": trial.memory_bytes,
            "fits": trial.passed is not None,
        }
        if trial.passed is not None:
            found |= {
                "elapsed_s": trial.passed.elapsed_s,
                "runs_s": trial.runs_s,
                "images_per_s": trial.images_per_s,
                "bubbles": trial.passed.bubbles,
                "predicted_bubbles": trial.passed.predicted_bubbles,
                "textbook_bubble": self._textbook(len(sweep.recorded.ranks), trial),
                "ledger": {rank.name: rank.shares for rank in _told(trial, trial.passed).ranks},
            }
        return found


def show_ledger(staged: Sweep) -> None:
    """Where the time of the best trial's median run went."""
    if staged.best is not None and staged.best.passed is not None:
        out = Console(stderr=True, highlight=False)
        out.print(f"\nwhere the time went, with {_at(staged.best)}")
        show(_told(staged.best, staged.best.passed, max(20, out.width - LABEL_WIDTH)), out)


def _told(trial: Trial, passed: Passed, num_columns: int = NUM_COLUMNS) -> ToldLedger:
    ledger = make_ledger(trial.recorded, *passed.window_ns)
    return ToldLedger.of(ledger, num_columns=num_columns)


def _speed_up(trial: Trial, reference: Trial | None) -> str:
    if trial.passed is None or reference is None:
        return ""
    return f"{trial.images_per_s / reference.images_per_s:.2f} x"


def _share(bubbles: Sequence[float]) -> str:
    return f"{_mean(bubbles):.1%}"
