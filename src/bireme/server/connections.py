"""HTTP connections that cannot be held open for nothing: uvicorn's, with bounds on what comes before a
request is whole."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from bireme.server.config import ServerConfig
from bireme.server.errors import ApiError

_MOST_HEADER_BYTES = 64 << 10
# Seconds without a word until the peer is asked, between two questions, and how many it may miss.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}


class BoundedProtocol(HttpToolsProtocol):
    """Closes a connection whose next request's head is too long or too slow, and those beyond
    `max_connections`; also one whose client takes nothing of its answer for `send_timeout_s`.

    uvicorn bounds the time between two requests alone; a body's bounds are the middleware's.
    """

    receive_timeout_s = 30.0
    send_timeout_s = 60.0
    max_connections = 4096

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._num_head_bytes = 0
        self._is_in_head = self._is_in_body = False
        self._deadline: asyncio.TimerHandle | None = None
        self._send_deadline: asyncio.TimerHandle | None = None

    @classmethod
    def with_bounds(cls, config: ServerConfig) -> type[BoundedProtocol]:
        names = ("receive_timeout_s", "send_timeout_s", "max_connections")
        return type(cls.__name__, (cls,), {name: getattr(config, name) for name in names})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
        else:
            _notice_dead_peers(transport.get_extra_info("socket"))
            self._begin_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_deadline()
        self._end_sending()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Time runs for the next request on this connection once the last one is answered."""
        was_in_head = self._is_in_head
        if self._deadline is None and not self._is_answering and not self._is_in_body:
            self._begin_deadline()
        super().data_received(data)
        if was_in_head and self._is_in_head:
            self._count_head(len(data))

    def on_message_begin(self) -> None:
        self._is_in_head, self._num_head_bytes = True, 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Behind a body in chunks there may be more of them, which nobody reads."""
        if self._is_in_body:
            self._count_head(len(name) + len(value))
        else:
            super().on_header(name, value)

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _count_head(self, num_bytes: int) -> None:
        self._num_head_bytes += num_bytes
        if self._num_head_bytes > _MOST_HEADER_BYTES:
            self.transport.abort()

    def pause_writing(self) -> None:
        """The client has yet to take what is written."""
        super().pause_writing()
        self._await_taken()

    def resume_writing(self) -> None:
        self._end_sending()
        super().resume_writing()

    def _await_taken(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._send_deadline = self.loop.call_later(self.send_timeout_s, self._check_taken, left)

    def _check_taken(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._await_taken()
        else:
            self.transport.abort()

    def _end_sending(self) -> None:
        if self._send_deadline is not None:
            self._send_deadline.cancel()
            self._send_deadline = None

    def send_400_response(self, msg: str) -> None:
        """Of what is no HTTP, in the same words as all errors."""
        body = ApiError(400, msg).as_json()
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def on_headers_complete(self) -> None:
        self._is_in_head, self._is_in_body = False, True
        self._end_deadline()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._is_in_body = False
        super().on_message_complete()

    def _begin_deadline(self) -> None:
        self._deadline = self.loop.call_later(self.receive_timeout_s, self._give_up)

    def _end_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self.transport.abort()


def _notice_dead_peers(sock: socket.socket) -> None:
    """A host that vanished says no goodbye; its request would run on for nobody."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if (option := getattr(socket, name, None)) is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
