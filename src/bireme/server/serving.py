"""What all routes share: the engine, the model's names, what the server is doing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

from bireme.engine.client import EngineClient
from bireme.engine.input_processor import InputProcessor
from bireme.errors import EngineError
from bireme.hf_config import read_json
from bireme.sampling_params import SamplingParams
from bireme.server.config import ServerConfig
from bireme.server.errors import ApiError
from bireme.server.ledger_reader import LedgerReader
from bireme.server.log import Log
from bireme.server.metrics import ServerMetrics
from bireme.server.tools.parsers import style_of
from bireme.server.tracing import Tracer

_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_MOST_NAMES = 100
_LEDGER_S = 1.0
_ANSWER_S = 1.0  # an engine that takes longer is left out of the metrics
_MOST_BODIES = 16  # of the longest, of all requests that are served


class Serving:
    """One server. `is_draining`: it ends, and takes no more requests."""

    def __init__(self, config: ServerConfig, client: EngineClient, model: str, log: Log) -> None:
        self.config, self.client, self.log = config, client, log
        self.model_names = config.served_model_names or (model,)
        self.root = model
        aliases = () if config.metrics_compat == "none" else (config.metrics_compat,)
        self.metrics = ServerMetrics(self.model_names[0], aliases=aliases)
        self.tracer = Tracer.of(config.otlp_traces_endpoint, self.model_names[0])
        self.created = int(time.time())
        self.is_draining = False
        self.num_active = 0
        self._num_body_bytes = 0
        self._receiving: set[asyncio.Timeout] = set()
        self.ledger = LedgerReader()
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._unknown: set[str] = set()

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
        now = asyncio.get_running_loop().time()
        for timeout in list(self._receiving):
            timeout.reschedule(now)

    async def until_idle(self) -> None:
        """Returns when no request is served."""
        await self._is_idle.wait()

    @property
    def inputs(self) -> InputProcessor:
        """ApiError 503 before the engine is ready, and after it broke."""
        self.check_ready()
        return self.client.inputs

    def check_ready(self) -> None:
        """ApiError 503 says what the engine is at, or why it broke."""
        if (error := self.broken) is not None:
            raise ApiError(503, f"the engine broke: {error}", code="engine_error")
        if not self.client.ready.done():
            raise ApiError(503, f"the model is loading ({self.client.doing})", code="loading")

    @property
    def broken(self) -> BaseException | None:
        """Why there will be no more answers."""
        ready = self.client.ready
        if not ready.done():
            return None
        return ready.exception() or self.client.callers.error

    def check_fits(self, num_requests: int) -> None:
        """RequestError for more than the engine ever takes; ApiError 503 while it cannot be asked."""
        self.check_ready()
        self.client.callers.check_fits(num_requests)

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

    @cached_property
    def defaults(self) -> Mapping[str, Any]:
        """Sampling parameters of the model's generation_config.json, where they are to be used.

        What is no parameter of ours is left out, as vLLM does.
        """
        path = self.inputs.model.folder / "generation_config.json"
        if self.config.generation_config != "auto" or not path.is_file():
            return {}
        given = read_json(path)
        found = {name: given[name] for name in _DEFAULTS if given.get(name) is not None}
        SamplingParams(**found)
        return found

    @cached_property
    def tool_style(self) -> str | None:
        template = self.inputs.tokenizer.chat_template if self.inputs.has_tokenizer else None
        return style_of(template, self.config.tool_call_parser)

    async def metrics_text(self) -> tuple[bytes, str]:
        """For Prometheus, with what the engine counts while it can be asked."""
        stats, ledger = None, None
        if self.client.ready.done() and self.broken is None:
            with suppress(EngineError, TimeoutError):
                stats = await asyncio.wait_for(self.client.stats(), _ANSWER_S)
        if stats is not None and self.ledger.is_there:
            with suppress(EngineError):
                ledger = await self.ledger.last(_LEDGER_S)
        return self.metrics.render(stats, ledger)

    def note_unknown(self, route: str, fields: Mapping[str, Any] | None) -> None:
        """Logs the fields that a route does not know, each once."""
        new = {f"{route} {name:.60}" for name in fields or ()} - self._unknown
        told = sorted(new)[: _MOST_NAMES - len(self._unknown)]
        if told:
            self._unknown.update(told)
            self.log.say("fields that are accepted and do nothing", fields=told)
