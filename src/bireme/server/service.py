"""What a server is at, whatever it serves: the model's names, its engine, who is being served."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Protocol

from bireme.errors import EngineError
from bireme.server.config import ServerConfig
from bireme.server.errors import OPENAI, ApiError, Dialect
from bireme.server.ledger_reader import LedgerReader
from bireme.server.live import Live
from bireme.server.log import Log
from bireme.server.look import look
from bireme.server.metrics_base import Metrics

_LEDGER_S = 1.0
_LEDGER_TURN_S = 1.0  # that metrics wait for other callers' ledgers, before they go without
_MOST_BODIES = 16  # of the longest, of all requests that are served


class Callers(Protocol):
    """Who waits for the engine."""

    @property
    def error(self) -> Exception | None:
        """Why it takes nothing; None while it does."""
        ...

    on_failure: Callable[[Exception], None]

    def fail(self, error: Exception) -> None:
        """And calls `on_failure`."""
        ...


class Client(Protocol):
    """An engine as the front end sees it; `ready` brings its `told`, `setup`, `rings` and `engine_ring`."""

    @property
    def ready(self) -> asyncio.Future[Any]: ...

    @property
    def doing(self) -> str:
        """What it is at before it is ready."""
        ...

    @property
    def callers(self) -> Callers: ...

    async def begin(self) -> None: ...

    async def aclose(self) -> None: ...

    def hurry(self) -> None:
        """Ends it at once, whatever it is at."""
        ...


class Service(ABC):
    """One server. `is_draining`: it ends, and takes no more requests."""

    dialect: Dialect = OPENAI

    def __init__(self, config: ServerConfig, engine: Client, name: str, log: Log) -> None:
        self.config, self.log, self.engine = config, log, engine
        self.model_names = config.served_model_names or (name,)
        self.created = int(time.time())
        self.is_draining = False
        self.num_active = 0
        self._num_body_bytes = 0
        self._receiving: set[asyncio.Timeout] = set()
        self.ledger = LedgerReader()
        self.live = Live(partial(look, self))
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    async def aclose(self) -> None:
        self.live.close()
        await self.ledger.aclose()
        await self.engine.aclose()

    @property
    @abstractmethod
    def metrics(self) -> Metrics[Any]: ...

    @abstractmethod
    async def stats(self) -> Any:
        """For the metrics; EngineError or TimeoutError where the engine does not answer."""

    @abstractmethod
    def how_to_ask(self, url: str, headers: str) -> tuple[str, str]:
        """Lines for people once it is ready: where it is, and what to type; `headers` are options of
        curl."""

    def begin(self, num: int) -> None:
        """So many more requests are served."""
        self.num_active += num
        if self.num_active:
            self._is_idle.clear()

    def end(self, num: int) -> None:
        self.num_active -= num
        if not self.num_active:
            self._is_idle.set()

    def hold_bytes(self, num_bytes: int) -> None:
        """So much more of requests' bodies is kept; ApiError 429 where that is too much for all."""
        most = _MOST_BODIES * self.config.max_body_bytes
        if self._num_body_bytes + num_bytes > most:
            raise ApiError(
                429,
                f"the bodies of all requests have {self._num_body_bytes + num_bytes} bytes; "
                f"{most} are taken at once; try again later",
                code="rate_limit_exceeded",
            )
        self._num_body_bytes += num_bytes

    def release_bytes(self, num_bytes: int) -> None:
        self._num_body_bytes -= num_bytes

    @contextmanager
    def receiving(self, timeout_s: float) -> Iterator[asyncio.Timeout]:
        """A time limit for more of a request to come; none comes any more once the server drains."""
        timeout = asyncio.timeout(0 if self.is_draining else timeout_s)
        self._receiving.add(timeout)
        try:
            yield timeout
        finally:
            self._receiving.discard(timeout)

    def drain(self) -> None:
        """From here on no request begins, and none that has yet to arrive goes on."""
        self.is_draining = True
        self.live.close()
        now = asyncio.get_running_loop().time()
        for timeout in list(self._receiving):
            timeout.reschedule(now)

    async def until_idle(self) -> None:
        """Returns when no request is served."""
        await self._is_idle.wait()

    @property
    def is_ready(self) -> bool:
        """True while the engine takes requests."""
        return self.engine.ready.done() and self.broken is None

    def check_ready(self) -> None:
        """ApiError 503 says what the engine is at, or why it broke."""
        if (error := self.broken) is not None:
            raise ApiError(503, f"the engine broke: {error}", code="engine_error")
        if not self.engine.ready.done():
            raise ApiError(503, f"the model is loading ({self.engine.doing})", code="loading")

    @property
    def broken(self) -> BaseException | None:
        """Why there will be no more answers."""
        ready = self.engine.ready
        if not ready.done():
            return None
        return ready.exception() or self.engine.callers.error

    @property
    def can_chat(self) -> bool:
        """Whether it goes on with conversations, as far as is known."""
        return False

    def health(self) -> dict[str, str]:
        """What it is at, as `/health` tells it."""
        if self.is_draining:
            return {"status": "shutting down"}
        if (error := self.broken) is not None:
            kind = "broken" if isinstance(error, EngineError) else "not started"
            return {"status": kind, "error": str(error)}
        if not self.engine.ready.done():
            return {"status": "loading", "doing": self.engine.doing}
        return {"status": "ready"}

    def check_model(self, name: str | None) -> str:
        """The name to answer under; none stands for the first."""
        if name is None:
            return self.model_names[0]
        if name not in self.model_names:
            known = ", ".join(self.model_names)
            raise ApiError(
                404,
                f"there is no model {name!r:.200}; this server has {known}",
                param="model",
                code="model_not_found",
            )
        return name

    async def metrics_text(self) -> tuple[bytes, str]:
        """For Prometheus, with what the engine counts while it can be asked."""
        stats, ledger = None, None
        if self.is_ready:
            with suppress(EngineError, TimeoutError):
                stats = await self.stats()
        if stats is not None and self.ledger.is_there:
            with suppress(EngineError):
                ledger = await self.ledger.soon(_LEDGER_S, _LEDGER_TURN_S)
        return self.metrics.render(stats, ledger)
