"""The front end as a process: it listens, shows how the engine starts, and ends when it is told to."""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import signal
import socket
import ssl
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
import uvloop
from starlette.types import ASGIApp

from bireme.errors import EngineError, UserError
from bireme.server.config import ServerConfig
from bireme.server.connections import BoundedProtocol
from bireme.server.log import LibraryLog, Log
from bireme.server.service import Client, Service

_LAST_WORDS_S = 1.0  # for answers to say that they were cut short


class _Server(uvicorn.Server):
    """Signals are the front end's to handle."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, with a bound on TLS handshakes, in which it knows nothing of a connection."""
        config, loop = self.config, asyncio.get_running_loop()
        protocol: Any = config.http_protocol_class
        timeout_s = None if config.ssl is None else protocol.receive_timeout_s
        self.servers = [
            await loop.create_server(
                lambda: protocol(config=config, server_state=self.server_state, app_state={}),
                sock=sock,
                ssl=config.ssl,
                ssl_handshake_timeout=timeout_s,
                backlog=config.backlog,
            )
            for sock in sockets or ()
        ]
        self.started = True

    def cut_connections(self) -> None:
        """Whose clients take nothing of what they are told."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


Make = Callable[[Log], tuple[Service, ASGIApp]]  # on the loop


class FrontEnd:
    """One server from its start to its end. SIGTERM and the first SIGINT drain, a second SIGINT ends at
    once."""

    def __init__(self, config: ServerConfig, sock: socket.socket, make: Make, log: Log) -> None:
        self.config, self._sock, self._make, self._log = config, sock, make, log
        self._ending: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """The exit status: 1 where the engine broke, 2 where what was asked for cannot be."""
        self._serving, app = self._make(self._log)
        engine = self._serving.engine
        self._server = _Server(self._uvicorn_config(app))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        gc.collect()
        gc.freeze()  # what is there now stays: no collection has to look through it again
        await engine.begin()
        starting = asyncio.create_task(self._start(engine))
        try:
            await self._server.serve([self._sock])
        finally:
            starting.cancel()
            await self._serving.aclose()
        error = self._serving.broken if self._ending is None else None
        if error is None:
            return 0
        return 2 if isinstance(error, UserError) else 1

    def _uvicorn_config(self, app: ASGIApp) -> uvicorn.Config:
        config = self.config
        return uvicorn.Config(
            app,
            loop="uvloop",
            http=BoundedProtocol.with_bounds(config),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=config.keep_alive_s,  # type: ignore[arg-type]  # call_later takes any
            timeout_graceful_shutdown=5,
            ssl_certfile=config.ssl_certfile,
            ssl_keyfile=config.ssl_keyfile,
            ssl_ca_certs=None if config.ssl_ca_certs is None else str(config.ssl_ca_certs),
            ssl_cert_reqs=ssl.CERT_NONE if config.ssl_ca_certs is None else ssl.CERT_REQUIRED,
        )

    async def _start(self, engine: Client) -> None:
        """Tells people what they need once the engine is ready; ends the server where it cannot start."""
        try:
            ready = await asyncio.shield(engine.ready)
        except Exception as error:
            self._serving.live.close()
            self._server.should_exit = True
            self._log.show(f"bireme: {error}")
            return
        engine.callers.on_failure = self._on_failure
        self._serving.ledger.begin(ready.rings, ready.engine_ring)
        self._log.show(*ready.told, *self._how_to_ask())

    def _on_failure(self, error: Exception) -> None:
        if self._ending is None:
            self._log.say("the engine broke; requests are refused", error=str(error))

    def _how_to_ask(self) -> list[str]:
        config, (host, port) = self.config, self._sock.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        url = f"{config.scheme}://{shown}:{port}"
        key = ' -H "Authorization: Bearer $BIREME_SERVE_API_KEY"' if config.api_keys else ""
        is_open = "" if config.api_keys else "; it is open to whoever reaches it (no --api-key)"
        first, then = self._serving.how_to_ask(url, key)
        return [first + is_open, f"  {then}"]

    def _on_signal(self, number: int) -> None:
        if self._ending is None:
            self._ending = asyncio.create_task(self._drain())
        elif number == signal.SIGINT:
            self._ending.cancel()
            self._serving.engine.hurry()
            self._server.force_exit = self._server.should_exit = True

    async def _drain(self) -> None:
        """New requests are refused; those that run may end, for a time."""
        serving, timeout_s = self._serving, self.config.shutdown_timeout_s
        serving.drain()
        self._log.say("shutting down", requests=serving.num_active, timeout_s=timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                await serving.until_idle()
        except TimeoutError:
            self._log.say("not all requests ended in time", requests=serving.num_active)
            serving.engine.callers.fail(EngineError("the server is shutting down"))
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORDS_S):
                    await serving.until_idle()
            self._server.cut_connections()
        self._server.should_exit = True


def raise_file_limit() -> None:
    """Every client is an open file: as many as the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def serve(config: ServerConfig, sock: socket.socket, make: Make) -> int:
    """Runs until it is told to end; the exit status."""
    raise_file_limit()
    log = Log(config.log_format)
    logging.basicConfig(handlers=[LibraryLog(log)], force=True)
    # Of what is no HTTP it would write a line each time.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    return uvloop.run(FrontEnd(config, sock, make, log).run())
