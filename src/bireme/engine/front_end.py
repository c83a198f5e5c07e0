"""The front end, as the engine's process knows it: the other side of a socket."""

from __future__ import annotations

import os
import socket
import threading
import traceback

import msgspec

from bireme.engine.engine import TokenEvent
from bireme.engine.messages import FrameReader, framed
from bireme.engine.service_messages import Broken, Events, FromEngine, Refused, ToEngine, Told
from bireme.errors import UserError

_TO_ENGINE: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)


class FrontEnd:
    """The other side of the socket: an `Outbox` of the engine, and where its commands come from."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._frames = sock, FrameReader(sock)
        self._encoder, self._sending = msgspec.msgpack.Encoder(), threading.Lock()

    def say(self, message: FromEngine) -> None:
        """Waits while the front end takes nothing; ends the process when it is gone."""
        frame = framed(self._encoder.encode(message))
        try:
            with self._sending:
                self._sock.sendall(frame)
        except ConnectionError:
            os._exit(0)

    def hear(self) -> ToEngine:
        """EOFError when the front end is gone."""
        body = self._frames.read()
        assert body is not None, "the socket blocks"
        return _TO_ENGINE.decode(body)

    def deliver(self, events: list[TokenEvent]) -> None:
        self.say(Events(events))

    def refuse(self, request_id: str, error: UserError) -> None:
        self.say(Refused(request_id, Told.of(error)))

    def fail(self, error: Exception) -> None:
        self.say(Broken(Told.of(error, "".join(traceback.format_exception(error)))))
