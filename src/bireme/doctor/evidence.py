"""What rules look at: the same of a run on disk and of a running server. None is what nobody measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean

from bireme.observe.causes import Row
from bireme.observe.profile_records import CollectiveSize, MessageSize
from bireme.observe.told import ToldLedger, ToldRank

_FULL = 0.95  # of the cache's blocks


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """`memory` is bytes by kind; `major_faults` are pages that were read from disk while it was watched.
    `decode_used`: shares of the probed flop/s and bytes/s that it achieved while decoding. `kernel_share`: of the
    time outside of collectives in which its GPU ran kernels. `reserved_bytes` are what its GPU's allocator
    holds, `alloc_retries` how often that was emptied for want of memory. `slowdowns` are shares of the time by
    what slowed its GPU's clocks down."""

    name: str
    stage: int
    device: str
    num_threads: int | None = None
    memory: Mapping[str, int] = field(default_factory=dict)
    major_faults: int | None = None
    decode_used: tuple[float, float] | None = None
    kernel_share: float | None = None
    reserved_bytes: int | None = None
    alloc_retries: int | None = None
    slowdowns: Mapping[str, float] = field(default_factory=dict)

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


@dataclass(frozen=True)
class Measured:
    """A pass with batches or chunks of one size: tokens a second (of output, of all), and median seconds between an
    answer's tokens and to its last, 0 where nothing tells."""

    size: int
    tokens_per_s: float
    itl_s: float
    e2e_s: float


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What came of all of a run's steps: seconds that an answer's token takes, and tokens of answers."""

    output_tokens_per_s: float
    itl_s: float
    num_steps: int
    num_output_tokens: int

    @property
    def step_s(self) -> float:
        return self.num_output_tokens / self.output_tokens_per_s / self.num_steps


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Of one run, or of a time in which a server was watched. `num_running` requests (micro-batches of a vision
    pipeline) were in flight on average; `is_slower_with_more`: more micro-batches were tried, and were slower.
    `batch` and `chunk` are the run's own sizes, `batches` and `chunks` passes of other sizes with them, from small to
    large; `largest_step`: tokens of the run's. `apart` are ranks that pass each other something, and whose GPUs cannot
    reach each other's memory. `damage` is what is wrong with the files, `departures` are where certificates say that
    the model is another, a line each; `cut_option` says which stage holds what; `notes` are what to know beside
    what is found."""

    source: str
    ranks: Sequence[RankFacts]
    ledger: ToldLedger | None = None
    is_layout_known: bool = True
    num_cores: int | None = None
    cache: CacheFacts | None = None
    num_running: float | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    cut_option: str = "--layers-per-stage"
    is_slower_with_more: bool = False
    pace: Pace | None = None
    collectives: Sequence[CollectiveSize] = ()
    messages: Sequence[MessageSize] = ()
    batch: int | None = None
    batches: Sequence[Measured] = ()
    chunk: int | None = None
    largest_step: int | None = None
    chunks: Sequence[Measured] = ()
    apart: Sequence[tuple[str, str]] = ()
    damage: Sequence[str] = ()
    departures: Sequence[str] = ()
    notes: Sequence[str] = ()

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
