"""What a front end and its engine process say to each other: msgpack in frames, over a socket pair."""

from __future__ import annotations

import msgspec

from bireme.config import EngineConfig
from bireme.engine.engine import TokenEvent
from bireme.engine.rank_stats import RankStats
from bireme.engine.setup import Setup
from bireme.errors import (
    BiremeError,
    CapacityError,
    CheckpointError,
    ConfigError,
    EngineError,
    RankError,
    RequestError,
    UserError,
)
from bireme.request import Request


class Start(msgspec.Struct, frozen=True, tag=True):
    """Become the engine of a model; the first message. `is_auto`: the smallest width that fits."""

    model: str
    config: EngineConfig
    is_auto: bool


class Add(msgspec.Struct, frozen=True, tag=True):
    request: Request


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_id: str


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End what runs, then the ranks."""


class AskStats(msgspec.Struct, frozen=True, tag=True):
    """Answered by `Stats`, at once."""


ToEngine = Start | Add | Abort | Stop | AskStats


class Progress(msgspec.Struct, frozen=True, tag=True):
    """What the engine is at before it is ready."""

    doing: str


class RingPlace(msgspec.Struct, frozen=True):
    """A rank, its device, and where its span ring can be opened while the engine runs."""

    name: str
    stage: int
    tp_rank: int
    device: str
    path: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Every rank has made a step. `told` are the lines for people: layout, memory, capacity."""

    folder: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]
    most_requests: int
    most_tokens: int
    num_cache_tokens: int
    max_concurrency: float
    told: list[str]
    setup: Setup
    rings: list[RingPlace] = []
    engine_ring: str = ""


class Events(msgspec.Struct, frozen=True, tag=True):
    """What one step brought."""

    events: list[TokenEvent]


class Stats(msgspec.Struct, frozen=True, tag=True):
    """Counts of the scheduler, and what its ranks did; those that end in `_total` since the start."""

    num_running: int
    num_waiting: int
    cache_usage: float  # 0 to 1, of the kind that is fullest
    num_preemptions_total: int
    prefix_queries_total: int  # tokens
    prefix_hits_total: int  # tokens
    ranks: list[RankStats] = []


class Refused(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    error: Told


class Broken(msgspec.Struct, frozen=True, tag=True):
    """The engine's last words: it cannot start, or a rank failed."""

    error: Told


class Told(msgspec.Struct, frozen=True):
    """An error of ours, as it crosses to another process."""

    kind: str
    message: str
    rank_name: str = ""
    traceback: str = ""

    @classmethod
    def of(cls, error: Exception, traceback: str = "") -> Told:
        if isinstance(error, RankError):
            return cls("RankError", error.cause, error.rank_name, error.traceback)
        if type(error) in _KINDS:
            return cls(type(error).__name__, str(error))
        return cls("EngineError", f"{type(error).__name__}: {error}", traceback=traceback)

    @property
    def error(self) -> BiremeError:
        if self.kind == "RankError":
            return RankError(self.rank_name, self.message, self.traceback)
        return next(kind for kind in _KINDS if kind.__name__ == self.kind)(self.message)


_KINDS = (CapacityError, CheckpointError, ConfigError, RequestError, UserError, EngineError)

FromEngine = Progress | Ready | Events | Stats | Refused | Broken
