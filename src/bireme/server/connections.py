"""HTTP connections that cannot be held open for nothing: uvicorn's, with bounds on what comes before a
request is whole."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from bireme.server.errors import ApiError

_MOST_HEADER_BYTES = 64 << 10


class BoundedProtocol(HttpToolsProtocol):
    """Closes a connection whose next request's head is too long or too slow, and those beyond
    `max_connections`.

    uvicorn bounds the time between two requests alone; a body's bounds are the middleware's.
    """

    receive_timeout_s = 30.0
    max_connections = 4096

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._num_head_bytes = 0
        self._has_head = False
        self._deadline: asyncio.TimerHandle | None = None

    @classmethod
    def with_bounds(cls, receive_timeout_s: float, max_connections: int) -> type[BoundedProtocol]:
        bounds = {"receive_timeout_s": receive_timeout_s, "max_connections": max_connections}
        return type(cls.__name__, (cls,), bounds)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
        else:
            self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._has_head and self._deadline is None:  # the next request on this connection
            self._begin_head()
        super().data_received(data)
        if self._deadline is not None:  # the head is still to come whole
            self._num_head_bytes += len(data)
            if self._num_head_bytes > _MOST_HEADER_BYTES:
                self.transport.abort()

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
        self._has_head = True
        self._end_head()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._has_head = False
        super().on_message_complete()

    def _begin_head(self) -> None:
        self._num_head_bytes = 0
        self._deadline = self.loop.call_later(self.receive_timeout_s, self._give_up)

    def _end_head(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self.transport.abort()
