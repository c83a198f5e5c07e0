"""A connection whose client takes nothing is closed, and what it keeps busy is let go."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from bireme.server.config import ServerConfig
from bireme.server.connections import BoundedProtocol

DEADLINE_S = 60
PART = b"x" * (1 << 16)


class Endless:
    """An application that sends until its client is gone."""

    def __init__(self) -> None:
        self.num_sent = 0
        self.is_left = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        sending = asyncio.create_task(self._send(send))
        while (await receive())["type"] != "http.disconnect":
            pass
        sending.cancel()
        self.is_left.set()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": PART, "more_body": True})
            self.num_sent += 1


@asynccontextmanager
async def asked(app: Endless, timeout_s: float) -> AsyncIterator[socket.socket]:
    """A connection on which a request was sent."""
    config = ServerConfig(send_timeout_s=timeout_s, receive_timeout_s=timeout_s)
    protocol = BoundedProtocol.with_bounds(config)
    server = uvicorn.Server(uvicorn.Config(app, http=protocol, lifespan="off", log_config=None))
    listening = socket.create_server(("127.0.0.1", 0))
    serving = asyncio.create_task(server._serve([listening]))
    sock = socket.create_connection(listening.getsockname())
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_sendall(sock, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        yield sock
    finally:
        sock.close()
        server.should_exit = True
        await serving


def test_a_client_that_takes_nothing_is_cut() -> None:
    async def main() -> None:
        app = Endless()
        async with asked(app, 0.2), asyncio.timeout(DEADLINE_S):
            await app.is_left.wait()
        assert app.num_sent  # as much as the system takes

    asyncio.run(main())


def test_a_client_that_takes_its_answer_is_not() -> None:
    """As much as many times what stays unread where nothing is taken."""

    async def main() -> None:
        app = Endless()
        async with asked(app, 0.2) as sock, asyncio.timeout(DEADLINE_S):
            left = 64 << 20
            while left > 0:
                left -= len(await asyncio.get_running_loop().sock_recv(sock, 1 << 16))
            assert not app.is_left.is_set()

    asyncio.run(main())


@pytest.mark.parametrize("more", [b"\r\n", b"GET /next HTTP/1.1\r\nHo"])
def test_what_follows_a_request_does_not_cut_its_answer(more: bytes) -> None:
    """Old clients send an empty line; the next request may come in parts."""

    async def main() -> None:
        app, loop = Endless(), asyncio.get_running_loop()
        async with asked(app, 0.2) as sock, asyncio.timeout(DEADLINE_S):
            assert await loop.sock_recv(sock, 1 << 16)
            await loop.sock_sendall(sock, more)
            until_s = loop.time() + 1  # five times what the head of a request may take
            while loop.time() < until_s:
                assert await loop.sock_recv(sock, 1 << 16)
            assert not app.is_left.is_set()

    asyncio.run(main())


def test_peers_that_vanish_are_noticed() -> None:
    async def main() -> None:
        accepted: list[int] = []

        class Noting(BoundedProtocol):
            def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
                super().connection_made(transport)
                sock = transport.get_extra_info("socket")
                accepted.append(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))

        config = uvicorn.Config(Endless(), http=Noting, lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        listening = socket.create_server(("127.0.0.1", 0))
        serving = asyncio.create_task(server._serve([listening]))
        socket.create_connection(listening.getsockname()).close()
        async with asyncio.timeout(DEADLINE_S):
            while not accepted:
                await asyncio.sleep(0)
        server.should_exit = True
        await serving
        assert accepted == [1]

    asyncio.run(main())
