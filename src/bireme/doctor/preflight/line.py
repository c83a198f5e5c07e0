"""What comes over a socket of somebody whom nobody knows: bounded in bytes, in time, and in what it may be."""

from __future__ import annotations

import selectors
import socket
import time
from typing import Any

import msgspec

from bireme.engine.messages import FrameReader

_MOST_BYTES = 1 << 20  # of what one says: anybody may try


class Nonsense(Exception):
    """What was said is none of the messages that may come."""


class Line:
    """One socket, and what comes over it."""

    def __init__(self, sock: socket.socket, decoder: msgspec.msgpack.Decoder[Any]) -> None:
        self._sock, self._decoder = sock, decoder
        self._reader = FrameReader(sock, _MOST_BYTES)

    def next(self, timeout_s: float) -> msgspec.Struct | None:
        """None where it has not come whole in time; EOFError where the other side is gone."""
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._sock, selectors.EVENT_READ)
            while selector.select(max(0.0, deadline - time.monotonic())):
                if (found := self._read()) is not None:
                    return found
        return None

    def _read(self) -> msgspec.Struct | None:
        try:
            body = self._reader.read()
            found: msgspec.Struct | None = None if body is None else self._decoder.decode(body)
        except (ValueError, msgspec.DecodeError) as error:
            raise Nonsense(str(error)) from None
        return found
