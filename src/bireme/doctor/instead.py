"""What half the tensor parallelism and twice the stages would give, calculated from a run: docs/doctor.md#slow-link."""

from __future__ import annotations

from dataclasses import dataclass

from bireme.doctor.evidence import Evidence
from bireme.observe.causes import Row


@dataclass(frozen=True, kw_only=True)
class Instead:
    """With requests enough for all stages, each step as large as the run's were."""

    tp: int
    pp: int
    output_tokens_per_s: float
    token_s: float
    gain: float  # its tokens a second by the run's

    @property
    def layout(self) -> str:
        return f"-tp {self.tp} -pp {self.pp}"


def halved(found: Evidence) -> Instead | None:
    """None where it cannot be cut so, or too little was measured."""
    pace, width, hand_over_s = found.pace, max(found.widths, default=1), _hand_over_s(found)
    is_even = set(found.widths) == {width} and width % 2 == 0 and found.is_layout_known
    if (
        found.ledger is None
        or pace is None
        or not pace.num_steps
        or not is_even
        or hand_over_s is None
    ):
        return None
    shares = min((it.shares for it in found.ledger.ranks), key=lambda it: it[Row.COLLECTIVE_WAIT])
    step_s = (
        pace.step_s
    )  # of all steps, as the tokens are, where the ledger may be of the last ones alone
    exchanged = (shares[Row.COLLECTIVE_MOVE] + shares[Row.COLLECTIVE_WAIT]) / 2
    exchanged *= _moved(width // 2) / _moved(width)
    stage_s = (shares[Row.COMPUTE] + shares[Row.HOST] + exchanged) * step_s + hand_over_s
    num_stages = 2 * len(found.widths)
    rate = pace.num_output_tokens / pace.num_steps / stage_s
    return Instead(
        tp=width // 2,
        pp=num_stages,
        output_tokens_per_s=rate,
        token_s=num_stages * stage_s,
        gain=rate / pace.output_tokens_per_s,
    )


def _hand_over_s(found: Evidence) -> float | None:
    """As messages to the next stage take; where there is none, as a sum does, which moves as many bytes
    `_moved` times."""
    messages = [it for it in found.messages if it.src_stage < it.dst_stage]
    if messages:
        return sum(it.time_s for it in messages) / sum(it.count for it in messages)
    sums = [it for it in found.collectives if it.kind == "all_reduce"]
    if not sums:
        return None
    moved = _moved(max(found.widths))
    return sum(it.move_s for it in sums) / sum(it.count for it in sums) / moved


def _moved(width: int) -> float:
    """How often a rank moves its tensor in a sum over so many."""
    return 2 * (width - 1) / width
