"""Grammars are compiled for requests that are still wanted, and beside what the engine does."""

from __future__ import annotations

import socket
import threading
from dataclasses import dataclass, field

import msgspec

from bireme import SamplingParams, StructuredOutputsParams
from bireme.engine.engine_loop import EngineCommand
from bireme.engine.front_end import FrontEnd
from bireme.engine.messages import FrameReader, framed
from bireme.engine.service_loop import Commands
from bireme.engine.service_messages import Abort, Add, FromEngine, Refused, Stats, ToEngine
from bireme.errors import RequestError
from bireme.request import Request

DEADLINE_S = 30


@dataclass
class Grammars:
    """Compiles in its own time: each waits until it is let go."""

    asked: list[str] = field(default_factory=list)
    has_begun: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def matcher(self, wanted: StructuredOutputsParams) -> str:
        assert wanted.regex is not None
        self.asked.append(wanted.regex)
        self.has_begun.set()
        assert self.go_on.wait(DEADLINE_S)
        if wanted.regex == "bad":
            raise RequestError("it is bad")
        return wanted.regex


class Talk:
    """A front end's side of the socket, and the commands that reached the engine."""

    def __init__(self) -> None:
        self._sock, theirs = socket.socketpair()
        self.grammars = Grammars()
        front_end = FrontEnd(theirs)
        self._commands = Commands(front_end)
        self._commands.begin(self.grammars, lambda: Stats(0, 0, 0.0, 0, 0, 0, []))  # type: ignore[arg-type]
        threading.Thread(target=self._follow, args=(front_end,), daemon=True).start()

    def _follow(self, front_end: FrontEnd) -> None:
        while True:
            self._commands._take(front_end.hear())

    def say(self, *messages: ToEngine) -> None:
        for message in messages:
            self._sock.sendall(framed(msgspec.msgpack.encode(message)))

    def hear(self) -> FromEngine:
        body = FrameReader(self._sock).read()
        assert body is not None
        found: FromEngine = msgspec.msgpack.decode(body, type=FromEngine)
        return found

    def taken(self, num: int) -> list[EngineCommand]:
        found: list[EngineCommand] = []
        while len(found) < num:
            found += self._commands.inbox.take()
        return found


def structured(name: str, regex: str) -> Add:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex=regex))
    return Add(Request(request_id=name, prompt_token_ids=(5,), params=params, seed=0))


def test_a_grammar_whose_request_was_aborted_is_not_compiled() -> None:
    talk = Talk()
    talk.say(structured("first", "a"))
    assert talk.grammars.has_begun.wait(DEADLINE_S)
    talk.say(structured("left", "b"), structured("last", "c"), Abort("left"), Abort("first"))
    aborts = talk.taken(2)
    talk.grammars.go_on.set()
    (added,) = talk.taken(1)
    assert aborts == ["left", "first"]
    assert isinstance(added, tuple)
    assert (added[0].request_id, str(added[1])) == ("last", "c")
    assert talk.grammars.asked == ["a", "c"]


def test_a_request_without_one_does_not_wait_and_a_bad_one_is_refused() -> None:
    talk = Talk()
    free = Request(request_id="free", prompt_token_ids=(5,), params=SamplingParams(), seed=0)
    talk.say(structured("bad", "bad"), Add(free))
    (added,) = talk.taken(1)
    assert isinstance(added, tuple)
    assert (added[0].request_id, added[1]) == ("free", None)
    talk.grammars.go_on.set()
    refused = talk.hear()
    assert isinstance(refused, Refused)
    assert (refused.request_id, str(refused.error.error)) == ("bad", "it is bad")
