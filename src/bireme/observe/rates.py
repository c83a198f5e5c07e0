"""What ranks achieved: operations and bytes of their steps, counted, by the time in which they computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from bireme.observe.causes import Row
from bireme.observe.ceilings import Ceilings
from bireme.observe.ledger import Ledger, RankLedger
from bireme.observe.profile_records import Phase, RankRate
from bireme.observe.timeline import Key
from bireme.parallel.operations import RankOperations
from bireme.request import ScheduledBatch

PHASES: tuple[Phase, ...] = ("prefill", "decode")


def phase_of(batch: ScheduledBatch) -> Phase:
    return "decode" if batch.is_decode else "prefill"


def rank_rates(
    ledger: Ledger,
    batches: Mapping[Key, ScheduledBatch],
    operations: Sequence[RankOperations],
    dtype: str,
    ceilings: Ceilings | None,
) -> list[RankRate]:
    """By rank and phase; of the steps in the ledger that are known by their batches."""
    return [
        rate
        for rank, (its, counted) in enumerate(zip(ledger.ranks, operations, strict=True))
        for phase in PHASES
        if (rate := _rate(rank, phase, its, batches, counted, dtype, ceilings)) is not None
    ]


def _rate(
    rank: int,
    phase: Phase,
    its: RankLedger,
    batches: Mapping[Key, ScheduledBatch],
    operations: RankOperations,
    dtype: str,
    ceilings: Ceilings | None,
) -> RankRate | None:
    worked: Counter[Key] = Counter()
    for piece in its.pieces:
        if piece.row is Row.COMPUTE and piece.key is not None and piece.key in batches:
            worked[piece.key] += piece.end_ns - piece.start_ns
    steps = {key: batches[key] for key in worked if phase_of(batches[key]) == phase}
    if not steps:
        return None
    seconds = sum(worked[key] for key in steps) / 1e9
    flop = sum(operations.flop(batch.pieces) for batch in steps.values())
    num_bytes = sum(operations.num_bytes(batch.pieces) for batch in steps.values())
    return RankRate(
        rank=rank,
        phase=phase,
        num_steps=len(steps),
        num_tokens=sum(batch.num_tokens for batch in steps.values()),
        compute_s=seconds,
        flop=flop,
        num_bytes=num_bytes,
        flop_per_s=flop / seconds if seconds else None,
        bytes_per_s=num_bytes / seconds if seconds else None,
        ceiling_flop_per_s=None if ceilings is None else ceilings.flop_per_s(rank, dtype),
        ceiling_bytes_per_s=None if ceilings is None else ceilings.memory_bytes_per_s(rank),
    )
