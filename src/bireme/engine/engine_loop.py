"""The engine at work for callers elsewhere: it takes their commands between steps, and tells them what
each step brought."""

from __future__ import annotations

from typing import Protocol

from bireme.engine.engine import Engine, Matcher, TokenEvent
from bireme.engine.inbox import Inbox
from bireme.errors import UserError
from bireme.request import Request

EngineCommand = tuple[Request, Matcher | None] | str | None  # add, abort by id, or close


class Outbox(Protocol):
    """To whom the engine tells what happened; called in the engine's thread."""

    def deliver(self, events: list[TokenEvent]) -> None: ...

    def refuse(self, request_id: str, error: UserError) -> None: ...

    def fail(self, error: Exception) -> None: ...


def run_engine(engine: Engine, inbox: Inbox[EngineCommand], outbox: Outbox) -> None:
    """Until closed or broken: a failure ends all requests, and is told."""
    try:
        while _obey(engine, inbox, outbox):
            if events := engine.step(inbox.wake):
                outbox.deliver(events)
        engine.settle()
    except Exception as error:
        outbox.fail(error)


def _obey(engine: Engine, inbox: Inbox[EngineCommand], outbox: Outbox) -> bool:
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
