"""What rules look at: the same of a run on disk and of a running server. None is what nobody measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean

from bireme.observe.causes import Row
from bireme.observe.told import ToldLedger, ToldRank

_FULL = 0.95  # of the cache's blocks


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """`memory` is bytes by kind; `major_faults` are pages that were read from disk while it was watched."""

    name: str
    stage: int
    device: str
    num_threads: int | None = None
    memory: Mapping[str, int] = field(default_factory=dict)
    major_faults: int | None = None

    @property
    def is_cpu(self) -> bool:
        return self.device.startswith("cpu")


@dataclass(frozen=True, kw_only=True)
class CacheFacts:
    """The KV cache: the largest share of it in use, requests that gave their blocks back, how many waited at
    most, the share of moments in which some waited and it was full, and how many requests of the longest length
    it holds."""

    most_used: float
    num_preemptions: int
    most_waiting: int
    short_share: float
    num_requests: float | None = None

    @classmethod
    def of(
        cls,
        moments: Sequence[tuple[float, int]],
        num_preemptions: int,
        num_requests: float | None,
    ) -> CacheFacts:
        """Of moments in which so much of it was in use and so many waited."""
        short = [used > _FULL and waiting > 0 for used, waiting in moments]
        return cls(
            most_used=max((used for used, _ in moments), default=0.0),
            num_preemptions=num_preemptions,
            most_waiting=max((waiting for _, waiting in moments), default=0),
            short_share=sum(short) / max(1, len(short)),
            num_requests=num_requests,
        )


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Of one run, or of a time in which a server was watched. `num_running` requests (micro-batches of a vision
    pipeline) were in flight on average. `damage` is what is wrong with the files, `departures` are where
    certificates say that the model is another, a line each; `cut_option` says which stage holds what."""

    source: str
    ranks: Sequence[RankFacts]
    ledger: ToldLedger | None = None
    is_layout_known: bool = True
    num_cores: int | None = None
    cache: CacheFacts | None = None
    num_running: float | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    cut_option: str = "--layers-per-stage"
    damage: Sequence[str] = ()
    departures: Sequence[str] = ()

    @property
    def num_stages(self) -> int:
        return 1 + max((rank.stage for rank in self.ranks), default=0)

    @property
    def widths(self) -> tuple[int, ...]:
        """Ranks by stage."""
        counts = Counter(rank.stage for rank in self.ranks)
        return tuple(counts[stage] for stage in sorted(counts))

    def share(self, *rows: Row) -> float:
        """Of the time in which there was work, on average over the ranks; 0 without a ledger."""
        if self.ledger is None or not self.ledger.ranks:
            return 0.0
        return mean(busy_share(rank, *rows) for rank in self.ledger.ranks)


def busy_share(rank: ToldRank, *rows: Row) -> float:
    """Of a rank's time in which there was work."""
    busy = 1.0 - rank.shares[Row.STARVED]
    return sum(rank.shares[row] for row in rows) / busy if busy > 0 else 0.0
