"""One rank's process, whatever its program: `python -m MODULE SOCKET_FD SPANS_FD`.

The main thread executes commands in their order. It takes them from its world's step channel, or,
while it is in none, from the socket, which a second thread reads. When the driver is gone that one
ends the process at once, whatever the main thread waits for, so that no rank outlives its driver.
A rank can leave one world and join the next.
"""

from __future__ import annotations

import gc
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Generic, NoReturn, TypeVar

import msgspec
import torch

from bireme.engine.channel import Steps, StepSource, open_source
from bireme.engine.messages import (
    Clock,
    CommandReader,
    Done,
    Failed,
    Join,
    Leave,
    Program,
    ReadClock,
    send,
)
from bireme.errors import PeerLost, UserError
from bireme.kernels.device_spans import DeviceSpans
from bireme.parallel.collectives import Communicator, join
from bireme.trace import SpanRing, SpanWriter

_LOOK_S = 0.001


class Commands:
    """What the driver asked for, in its order."""

    def __init__(self, program: Program) -> None:
        self._read: queue.SimpleQueue[msgspec.Struct] = queue.SimpleQueue()
        self._decode = program.commands.decode
        self._steps: StepSource | None = None
        self._look: Callable[[], float | None] = lambda: None
        self.put = self._read.put  # what came over the socket

    def follow(
        self, steps: StepSource | None, look: Callable[[], float | None] = lambda: None
    ) -> None:
        """From here on commands come over `steps`; None: over the socket. `look` is called while none
        comes: it says in how many seconds again, or None."""
        if self._steps is not None:
            self._steps.close()
        self._steps, self._look = steps, look

    def next(self) -> msgspec.Struct:
        if self._steps is None:
            return self._read.get()
        body = None
        while body is None:
            body = self._steps.receive(self._look())
        command: msgspec.Struct = self._decode(body)
        return command


C = TypeVar("C", bound=Commands)


class Rank(ABC, Generic[C]):
    """State of one rank between commands: what it talks through while it is in a world."""

    def __init__(
        self, spans: SpanRing, commands: C, answer: Callable[[msgspec.Struct], None]
    ) -> None:
        self._ring, self._commands, self._answer = spans, commands, answer
        self._spans: SpanWriter = spans
        self._comm: Communicator | None = None
        self._device = torch.device("cpu")
        self.communication_bytes = 0  # that joining took of a GPU

    def obey(self, command: msgspec.Struct) -> msgspec.Struct | None:
        """Executes one command; None where this rank has nothing to say."""
        match command:
            case Join():
                return self.join(command)
            case ReadClock():
                return Clock(time.monotonic_ns())
            case Leave():
                return self.leave()
        return self.handle(command)

    @abstractmethod
    def handle(self, command: msgspec.Struct) -> msgspec.Struct | None:
        """A command of this program alone."""

    @abstractmethod
    def drop(self, *, is_orderly: bool) -> None:
        """Lets go of the model. `is_orderly`: what was sent is to arrive first."""

    def join(self, command: Join) -> Done:
        torch.set_num_threads(command.num_threads)
        self._device = torch.device(command.device)
        is_cuda = self._device.type == "cuda"
        self._spans = DeviceSpans(self._ring, self._device) if is_cuda else self._ring
        free_bytes = _free_bytes(self._device)
        self._comm = join(
            command.widths,
            command.rank,
            Path(command.store_path) if command.segment else _held_open(command.store_path),
            self._device,
            command.timeout_s,
            self._spans,
            command.segment,
            command.room,
        )
        self.communication_bytes = max(0, free_bytes - _free_bytes(self._device))
        self._commands.follow(open_source(command.steps, command.rank), self.look)
        return Done()

    def look(self) -> float | None:
        """Sees to what the device has done meanwhile: spans are written once it has passed them. In how many
        seconds to look again; None where nothing is awaited."""
        if not isinstance(self._spans, DeviceSpans):
            return None
        self._spans.collect()
        return _LOOK_S if self._spans.is_pending else None

    def finish_spans(self) -> None:
        """Waits until all are written."""
        if isinstance(self._spans, DeviceSpans):
            self._spans.flush()

    def leave(self) -> Done:
        """Gives the groups, the model and its memory back; commands come over the socket again."""
        self._commands.follow(None)
        self._let_go(is_orderly=True)
        self.finish_spans()
        return Done()

    def abandon(self) -> None:
        """Leaves without waiting for anybody: after a failure."""
        self._let_go(is_orderly=False)

    def _let_go(self, *, is_orderly: bool) -> None:
        self.drop(is_orderly=is_orderly)
        comm, self._comm = self._comm, None
        if comm is not None:
            comm.leave()
        del comm
        gc.collect()  # parts of a model refer to one another, and hold most of a device's memory


def _free_bytes(device: torch.device) -> int:
    """Of a GPU; 0 of a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _held_open(store_path: str) -> Path:
    """The same file, for as long as this process lives. torch opens it anew each time, at last when the
    groups of a world that was left are collected; where it is gone, with the driver, torch waits for
    minutes and lets no other thread run, and where it is another world's, for ever."""
    fd = os.open(store_path, os.O_RDWR | os.O_CLOEXEC)
    return Path(f"/proc/self/fd/{fd}")


def _failure(error: BaseException) -> Failed:
    return Failed(
        cause=f"{type(error).__name__}: {error}",
        traceback=traceback.format_exc(),
        is_user_error=isinstance(error, UserError),
        is_secondary=isinstance(error, PeerLost),
    )


def _read_commands(sock: socket.socket, program: Program, commands: Commands) -> None:
    """The lifeline: when the driver's end closes, this process ends at once, and leaves no file that the
    driver would have removed."""
    reader, steps = CommandReader(sock, program), list[Steps]()
    try:
        while True:
            command = reader.next()
            if isinstance(command, Join):
                steps = [command.steps]
            commands.put(command)
    except EOFError:
        for one in steps:
            one.remove()
        os._exit(0)
    except Exception as error:
        _end(sock, error)


def _answer(sock: socket.socket, reply: msgspec.Struct) -> None:
    with suppress(ConnectionError):  # the driver is gone: `_read_commands` ends this process
        send(sock, reply)


def _end(sock: socket.socket, error: Exception) -> NoReturn:
    """Of a rank that cannot read what it is told."""
    _answer(sock, _failure(error))
    os._exit(1)


def serve(program: Program, rank_type: type[Rank[C]], commands: C) -> None:
    """Executes commands until the driver closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    sock = socket.socket(fileno=int(sys.argv[1]))
    rank = rank_type(SpanRing(int(sys.argv[2])), commands, partial(_answer, sock))
    threading.Thread(target=_read_commands, args=(sock, program, commands), daemon=True).start()
    while True:
        try:
            command = commands.next()
        except Exception as error:
            _end(sock, error)
        try:
            reply = rank.obey(command)
        except Exception as error:  # every failure becomes a message to the driver
            reply = _failure(error)
            rank.abandon()
        if reply is not None:
            _answer(sock, reply)
