"""What a server is at in one moment: counts from where `/metrics` has them, and the ledger with the last
steps, as one event of `/debug/live`."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec

from bireme import __version__
from bireme.errors import EngineError, RankError
from bireme.observe.told import ToldLedger
from bireme.server.metrics_base import Counts

if TYPE_CHECKING:
    from bireme.server.service import Service

_LEDGER_S = 1.0
_TURN_S = 1.0
_MOST_STEPS = 16  # of the ledger: each costs, and a fast server makes hundreds a second
_GANTT_STEPS = 12
_NO_LINES = 0  # for terminals, which nobody reads here
_MOST_BARS = 4096  # of all ranks
_BARS_A_RANK = 600  # where these allow it


class LiveRank(msgspec.Struct, frozen=True):
    name: str
    stage: int
    tp_rank: int
    device: str


class LiveServer(msgspec.Struct, frozen=True):
    """What is served and where; no ranks before they have started. `created` as in `/v1/models`: a server that
    began anew has another, and counts anew."""

    version: str
    created: int
    models: list[str]
    can_chat: bool
    ranks: list[LiveRank]
    told: list[str]


class Moment(msgspec.Struct, frozen=True):
    """`stats` are what the engine tells of itself, whatever kind it is; None while it does not answer."""

    time_s: float
    health: dict[str, str]
    failed_rank: str
    server: LiveServer
    num_active: int
    stats: Any
    ledger: ToldLedger | None
    counts: Counts


async def look(service: Service) -> bytes:
    """As JSON."""
    stats, ledger = None, None
    if service.is_ready:
        with suppress(EngineError, TimeoutError):
            stats = await service.stats()
    if service.ledger.is_there:
        with suppress(EngineError):
            ledger = await _ledger(service)
    error = service.broken
    moment = Moment(
        time_s=time.time(),
        health=service.health(),
        failed_rank=error.rank_name if isinstance(error, RankError) else "",
        server=_server(service),
        num_active=service.num_active,
        stats=stats,
        ledger=ledger,
        counts=service.metrics.counts(),
    )
    return msgspec.json.encode(moment)


async def _ledger(service: Service) -> ToldLedger:
    num_ranks = len(service.ledger.ranks)
    return await service.ledger.soon(
        _LEDGER_S,
        _TURN_S,
        _NO_LINES,
        is_running=service.broken is None,
        most_steps=_MOST_STEPS,
        gantt_steps=_GANTT_STEPS,
        gantt_bars=min(_MOST_BARS, _BARS_A_RANK * num_ranks),
    )


def _server(service: Service) -> LiveServer:
    ready = service.engine.ready
    is_known = ready.done() and not ready.exception()
    return LiveServer(
        version=__version__,
        created=service.created,
        models=list(service.model_names),
        can_chat=service.can_chat,
        ranks=[
            LiveRank(ring.name, ring.stage, ring.tp_rank, ring.device)
            for ring in (ready.result().rings if is_known else ())
        ],
        told=ready.result().told if is_known else [],
    )
