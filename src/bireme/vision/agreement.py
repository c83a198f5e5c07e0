"""Whether stages compute what one device computes."""

from __future__ import annotations

from bireme.errors import EngineError
from bireme.vision.sweep import Sweep, Trial


def check_same(alone: Sweep, staged: Sweep, allowed: float) -> None:
    """EngineError where logits are no numbers, or differ from those of one device at its best, or of the stages
    where none fits one device; whatever the micro-batches. `allowed` is a share of the largest logit."""
    for trial in (*alone.trials, *staged.trials):
        if trial.passed is not None and not trial.passed.logits.isfinite().all():
            raise EngineError(
                f"at {trial.num_micro_batches} micro-batches logits are not finite; give weights that fit the dtype"
            )
    mixed = "what the module makes of an image depends on the others of its batch, which no pipeline keeps together"
    for _, difference, largest in differences(alone, alone):
        if difference > allowed * largest:
            raise EngineError(
                f"one device's logits differ by {difference:.1e} between numbers of micro-batches, "
                f"{allowed * largest:.1e} is allowed: {mixed}"
            )
    is_compared = alone.best is not None
    for trial, difference, largest in differences(alone if is_compared else staged, staged):
        if difference > allowed * largest:
            other = "one device" if is_compared else "what they compute in other micro-batches"
            raise EngineError(
                f"at {trial.num_micro_batches} micro-batches the stages differ from {other} by {difference:.1e}, "
                f"of logits up to {largest:.1e}; {allowed * largest:.1e} is allowed"
                + ("" if is_compared else f": {mixed}, or a stage is wrong")
            )


def allowed_difference(dtype: str, device: str) -> float:
    """A share of the largest logit; GPUs compute float32 convolutions in TF32."""
    if dtype != "float32":
        return 3e-2
    return 1e-5 if device.startswith("cpu") else 1e-3


def differences(reference: Sweep, other: Sweep) -> list[tuple[Trial, float, float]]:
    """Of each trial that ran, and of its control, to the best of another sweep: the largest of any logit, and
    the largest logit."""
    if reference.best is None or reference.best.passed is None:
        return []
    expected = reference.best.passed.logits
    largest = float(expected.abs().max())
    found = []
    for trial in other.trials:
        if trial.passed is not None:
            seen = [trial.passed.logits, *([] if trial.control is None else [trial.control])]
            # a control is of one batch, as many as are in a row in a run
            gaps = [float((expected[: len(logits)] - logits).abs().max()) for logits in seen]
            found.append((trial, max(gaps), largest))
    return found
