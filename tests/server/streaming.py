"""Streams that tests read beside what they do, and requests byte by byte."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from served import DEADLINE_S, Served

COMPLETIONS = "/v1/completions"
LONG: dict[str, Any] = {
    "prompt": "import ",
    "max_tokens": 100,
    "ignore_eos": True,
    "temperature": 0,
    "stream": True,
    "return_token_ids": True,
}


class Streaming:
    """A long stream that is read in a thread of its own, from its first token on."""

    def __init__(self, server: Served, *, api_key: str = "", **settings: Any) -> None:
        self._connection = http.client.HTTPConnection(server.host, server.port, timeout=DEADLINE_S)
        body = json.dumps({**LONG, **settings})
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._connection.request("POST", COMPLETIONS, body, headers)
        self._response = self._connection.getresponse()
        assert self._response.status == 200
        self._text = b""
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            while data := self._response.read1(1 << 16):
                self._text += data
        except (http.client.HTTPException, ConnectionError):
            pass  # it was cut: there is no [DONE]
        self._connection.close()

    def text(self) -> bytes:
        """All that came, once it has ended."""
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        return self._text

    def tokens(self) -> list[int]:
        """All of them, once it has ended."""
        *events, done, end = self.text().split(b"\n\n")
        assert (done, end) == (b"data: [DONE]", b"")
        told = [json.loads(event.removeprefix(b"data: ")) for event in events]
        return [id_ for one in told for id_ in one["choices"][0]["token_ids"]]


@contextmanager
def watching(server: Served) -> Iterator[Callable[[], Any]]:
    """Reads the next moment of /debug/live; EOFError where there is none."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=DEADLINE_S)
    connection.request("GET", "/debug/live")
    response = connection.getresponse()
    assert response.status == 200, response.read()
    assert response.headers["content-type"].startswith("text/event-stream")

    def following() -> Any:
        if not (line := response.readline()):
            raise EOFError
        assert line == b"event: moment\n"
        data = response.readline().removeprefix(b"data: ")
        assert response.readline() == b"\n"
        return json.loads(data)

    try:
        yield following
    finally:
        response.close()
        connection.close()


def connect(server: Served) -> socket.socket:
    return socket.create_connection((server.host, server.port), timeout=DEADLINE_S)


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = (
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *headers,
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
