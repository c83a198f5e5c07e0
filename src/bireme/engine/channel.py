"""How commands go from the driver to all ranks of a world at once, once these have joined.

One small protocol, two ways: a ring in shared memory where all are on one host, else ZeroMQ. What
goes through is msgpack; the socket pair of each rank stays for its replies, and as its lifeline.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Protocol

import msgspec
import zmq

from bireme.parallel.broadcast import (
    MAX_FRAME_BYTES,
    WATCH_S,
    BroadcastReader,
    BroadcastWriter,
    RingPlan,
    Watch,
    check_length,
)

_MOST_WAITING = 32  # messages on either side of a ZeroMQ connection


class RingSteps(msgspec.Struct, frozen=True, tag=True):
    """A ring at a path (of /proc, so that nothing is left behind)."""

    path: str
    plan: RingPlan

    def remove(self) -> None:
        """The memory goes with the last that maps it."""


class QueueSteps(msgspec.Struct, frozen=True, tag=True):
    """A ZeroMQ endpoint of each rank, in a folder of their own, to which the driver binds."""

    endpoints: tuple[str, ...]

    def remove(self) -> None:
        """Unlinks what can be seen of the endpoints; who is connected stays connected."""
        paths = [Path(endpoint.removeprefix("ipc://")) for endpoint in self.endpoints]
        for path in paths:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # others do so at the same time
            paths[0].parent.rmdir()


Steps = RingSteps | QueueSteps


class StepChannel(Protocol):
    """The driver's end."""

    def send(self, body: bytes, watch: Watch) -> None:
        """To every rank. `watch` is asked from time to time while a rank keeps this waiting."""
        ...

    def close(self) -> None: ...


class StepSource(Protocol):
    """A rank's end."""

    def receive(self, timeout_s: float | None = None) -> bytearray | bytes | None:
        """The next message; None where none begins within `timeout_s`."""
        ...

    def close(self) -> None: ...


def open_channel(steps: Steps) -> StepChannel:
    return RingChannel(steps) if isinstance(steps, RingSteps) else QueueChannel(steps)


def open_source(steps: Steps, rank: int) -> StepSource:
    return RingSource(steps, rank) if isinstance(steps, RingSteps) else QueueSource(steps, rank)


class RingChannel(BroadcastWriter):
    def __init__(self, steps: RingSteps) -> None:
        super().__init__(steps.path, steps.plan)

    def close(self) -> None:
        """The memory goes with the last that maps it."""


class RingSource(BroadcastReader):
    def __init__(self, steps: RingSteps, rank: int) -> None:
        super().__init__(steps.path, steps.plan, rank)

    def close(self) -> None:
        """The memory goes with the last that maps it."""


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, _MOST_WAITING)
    socket.setsockopt(zmq.RCVHWM, _MOST_WAITING)
    socket.setsockopt(zmq.SNDTIMEO, int(WATCH_S * 1000))
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    return socket


class QueueChannel:
    def __init__(self, steps: QueueSteps) -> None:
        self._context = zmq.Context[zmq.Socket[bytes]]()
        self._sockets = []
        for endpoint in steps.endpoints:
            socket = _socket(self._context, zmq.PUSH)
            self._sockets.append(socket)
            socket.bind(endpoint)

    def send(self, body: bytes, watch: Watch) -> None:
        check_length(len(body))
        for rank, socket in enumerate(self._sockets):
            while not _has_taken(socket, body):
                watch(rank)

    def close(self) -> None:
        self._context.destroy()


def _has_taken(socket: zmq.Socket[bytes], body: bytes) -> bool:
    try:
        socket.send(body)
    except zmq.Again:
        return False
    return True


class QueueSource:
    def __init__(self, steps: QueueSteps, rank: int) -> None:
        self._context = zmq.Context[zmq.Socket[bytes]]()
        self._socket = _socket(self._context, zmq.PULL)
        self._socket.connect(steps.endpoints[rank])

    def receive(self, timeout_s: float | None = None) -> bytes | None:
        if not self._socket.poll(None if timeout_s is None else int(timeout_s * 1000)):
            return None
        return self._socket.recv()

    def close(self) -> None:
        self._context.destroy()
