"""What a comparison found, for programs and for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import msgspec


class Tolerance(NamedTuple):
    """Logit differences in standard deviations of the reference's: the largest, and the mean."""

    largest: float
    mean: float

    @property
    def near_tie(self) -> float:
        """Two tokens that are no further apart may change places."""
        return min(2 * self.largest, 10 * self.mean)


# Zoo and demo in bfloat16: whole models differ by up to 0.43 and 0.020 on average (0.35 and 0.026
# from transformers), with the least fault, a bias added twice, by 0.26 and 0.038. In float16 it is
# 0.035 and 0.0023, the fault as large. In float32 nothing but a fault comes near the largest.
TOLERANCES = {
    "float32": Tolerance(1e-4, 1e-4),
    "float16": Tolerance(6e-2, 5e-3),
    "bfloat16": Tolerance(5e-1, 3e-2),
}
# A token on the edge between two experts goes to another one: up to 1.34 and 0.030 in bfloat16,
# 0.64 and 0.0054 in float16; faults make more than 0.5 on average.
ROUTED_TOLERANCES = {
    "float32": TOLERANCES["float32"],
    "float16": Tolerance(2.0, 2e-2),
    "bfloat16": Tolerance(2.0, 5e-2),
}


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

    Differences are of logits; `relative_difference` is the largest one and `relative_mean` the mean
    over `spread`, the reference's standard deviation. Agreement is the share of positions with the
    same greedy token; `num_excused` positions differ where the reference's two best are nearly tied;
    `num_not_finite` logits of either model are NaN or infinite. `departure_unknown` says why no
    departure was looked for where there should be one. `artifact` is its manifest's hash, None of
    another checkpoint.
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
    relative_mean: float
    mean_tolerance: float
    prefill_agreement: float
    decode_agreement: float
    num_excused: int
    num_not_finite: int
    departure: Departure | None
    departure_unknown: str | None
    is_same: bool
    artifact: str | None = None


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
    if found.mean_tolerance < found.tolerance:
        relative += f", and {found.relative_mean:.1e} of {found.mean_tolerance:.0e} on average"
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
    if found.departure_unknown is not None:
        lines.append(f"  departs at a place that is not looked for: {found.departure_unknown}")
    return "\n".join(lines)
