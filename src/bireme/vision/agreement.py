"""Whether stages compute what one device computes."""

from __future__ import annotations

import math

from bireme.errors import EngineError
from bireme.vision.sweep import Sweep, Trial


def check_same(alone: Sweep, staged: Sweep, allowed: float) -> None:
    """EngineError where logits are no numbers, or the stages' are not those of one device, whatever the
    micro-batches; `allowed` is a share of the largest logit."""
    for _, difference, largest in differences(alone, alone):
        if difference > allowed * largest:
            raise EngineError(
                f"one device's logits differ by {difference:.1e} between numbers of micro-batches, "
                f"{allowed * largest:.1e} is allowed: what the module makes of an image depends on the others "
                "of its batch, which no pipeline keeps together"
            )
    for trial, difference, largest in differences(alone, staged):
        at = f"at {trial.num_micro_batches} micro-batches"
        if not math.isfinite(difference) or not math.isfinite(largest):
            raise EngineError(f"{at} logits are not finite; give weights that fit the dtype")
        if difference > allowed * largest:
            raise EngineError(
                f"{at} the stages differ from one device by {difference:.1e}, of logits up to "
                f"{largest:.1e}; {allowed * largest:.1e} is allowed"
            )


def allowed_difference(dtype: str, device: str) -> float:
    """A share of the largest logit; GPUs compute float32 convolutions in TF32."""
    if dtype != "float32":
        return 3e-2
    return 1e-5 if device.startswith("cpu") else 1e-3


def differences(alone: Sweep, staged: Sweep) -> list[tuple[Trial, float, float]]:
    """Of each trial that ran to one device at its best: the largest of any logit, and the largest logit."""
    if alone.best is None or alone.best.passed is None:
        return []
    expected = alone.best.passed.logits
    return [
        (trial, float((expected - trial.passed.logits).abs().max()), float(expected.abs().max()))
        for trial in staged.trials
        if trial.passed is not None
    ]
