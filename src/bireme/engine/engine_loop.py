"""The engine at work for callers elsewhere: it takes their commands between steps, and tells them what
each step brought."""

from __future__ import annotations

import os
import queue
import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import Protocol

from bireme.engine.engine import Engine, Matcher, TokenEvent
from bireme.errors import UserError
from bireme.request import Request

EngineCommand = tuple[Request, Matcher | None] | str | None  # add, abort by id, or close


class Inbox:
    """Commands for the engine, from any thread; `wake` is readable while some may be there."""

    def __init__(self) -> None:
        self._commands: queue.SimpleQueue[EngineCommand] = queue.SimpleQueue()
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        weakref.finalize(self, _close, self._reader, self._writer)

    @property
    def wake(self) -> int:
        return self._reader

    def put(self, command: EngineCommand) -> None:
        self._commands.put(command)
        with suppress(BlockingIOError):  # full: it is readable already
            os.write(self._writer, b"\0")

    def take(self) -> Iterator[EngineCommand]:
        """All that are there."""
        with suppress(BlockingIOError):
            os.read(self._reader, 1 << 16)
        try:
            while True:
                yield self._commands.get_nowait()
        except queue.Empty:
            return


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


class Outbox(Protocol):
    """To whom the engine tells what happened; called in the engine's thread."""

    def deliver(self, events: list[TokenEvent]) -> None: ...

    def refuse(self, request_id: str, error: UserError) -> None: ...

    def fail(self, error: Exception) -> None: ...


def run_engine(engine: Engine, inbox: Inbox, outbox: Outbox) -> None:
    """Until closed or broken: a failure ends all requests, and is told."""
    try:
        while _obey(engine, inbox, outbox):
            if events := engine.step(inbox.wake):
                outbox.deliver(events)
        engine.settle()
    except Exception as error:
        outbox.fail(error)


def _obey(engine: Engine, inbox: Inbox, outbox: Outbox) -> bool:
    """Does what callers asked for since the last step; waits where there is nothing else to do. False
    once closed."""
    engine.wait_while_idle(inbox.wake)
    for command in inbox.take():
        match command:
            case None:
                return False
            case str(request_id):
                engine.abort(request_id)
            case (request, matcher):
                try:
                    engine.add(request, matcher)
                except UserError as error:
                    outbox.refuse(request.request_id, error)
    return True
