"""What a comparison found, for programs and for people."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

# largest logit difference, in standard deviations of the reference's logits
TOLERANCES = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 2e-1}


@dataclass(frozen=True)
class Departure:
    """The first place where a rank computed something else than the whole model did."""

    step: int
    layer: int | None
    rank: int
    what: str
    relative_difference: float

    def __str__(self) -> str:
        place = f"layer {self.layer}, " if self.layer is not None else ""
        return f"step {self.step}, {place}rank {self.rank}: {self.what} (off by {self.relative_difference:.1e})"


@dataclass(frozen=True)
class Certificate:
    """What was compared, and how far the two models were apart.

    Differences are of logits; `relative_difference` is the largest one over `spread`, the
    reference's standard deviation. Agreement is the share of positions with the same greedy token;
    `num_excused` positions differ where the reference's two best are closer than the tolerance;
    `num_not_finite` logits of either model are NaN or infinite.
    """

    model: str
    layout: str
    widths: tuple[int, ...]
    layers_per_stage: tuple[int, ...]
    dtype: str
    device: str
    reference: str
    num_prompts: int
    num_prefill_positions: int
    num_decode_positions: int
    max_difference: float
    mean_difference: float
    spread: float
    relative_difference: float
    tolerance: float
    prefill_agreement: float
    decode_agreement: float
    num_excused: int
    num_not_finite: int
    departure: Departure | None
    is_same: bool


def certificate_json(found: Certificate) -> str:
    """A number that is none (NaN, infinite) is null."""
    return msgspec.json.format(msgspec.json.encode(found), indent=1).decode()


def certificate_name(found: Certificate) -> str:
    """A file name of its own for each reference, cut, dtype and device."""
    widths, layers = (
        ",".join(map(str, numbers)) for numbers in (found.widths, found.layers_per_stage)
    )
    cut = f"tp{widths}-layers{layers}"
    return f"certificate-{found.reference}-{cut}-{found.dtype}-{found.device}.json"


def certificate_text(found: Certificate) -> str:
    """A certificate for people, in a few lines."""
    verdict = "the same model" if found.is_same else "NOT the same model"
    relative = f"{found.relative_difference:.1e} of the spread; {found.tolerance:.0e} is allowed"
    if found.spread == 0:
        relative = "all logits of the reference are equal, so that no difference at all is allowed"
    agreement = f"{found.prefill_agreement:.2%} of prefill"
    if found.num_decode_positions:
        agreement += f", {found.decode_agreement:.2%} of decode"
    lines = [
        f"{found.model} at {found.layout} ({found.dtype}, {found.device}) against {found.reference}: {verdict}",
        f"  compared       {found.num_prefill_positions} prefill and {found.num_decode_positions} decode positions "
        f"of {found.num_prompts} prompts",
        f"  logits         max |difference| {found.max_difference:.2e}, mean {found.mean_difference:.2e}, "
        f"spread {found.spread:.2f}",
        f"  relative       {relative}",
        f"  greedy tokens  {agreement}"
        + (f"; {found.num_excused} near ties" if found.num_excused else ""),
    ]
    if found.num_not_finite:
        lines.append(
            f"  not finite     {found.num_not_finite} logits are NaN or infinite; none may be"
        )
    if found.departure is not None:
        lines.append(f"  departs first at {found.departure}")
    return "\n".join(lines)
