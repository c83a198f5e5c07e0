"""The side of the host that listens: lets others in, and asks all of them, itself among them."""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec

from bireme.doctor.preflight.host import Host
from bireme.doctor.preflight.line import Line, Nonsense
from bireme.doctor.preflight.messages import PREFLIGHT, HostFacts, Refused
from bireme.engine.messages import Failed, send
from bireme.errors import EngineError

_SEND_S = 30.0


class Member:
    """One that came: what it said of itself, and the way to it. Of the host that listens there is no way: it
    answers when it is asked for its answer, so that the others work at the same time."""

    def __init__(self, facts: HostFacts, sock: socket.socket | None, host: Host | None) -> None:
        self.facts, self.sock, self._host = facts, sock, host
        self._line = None if sock is None else Line(sock, PREFLIGHT.replies)
        self._asked: msgspec.Struct | None = None

    def tell(self, message: msgspec.Struct) -> None:
        self._asked = message
        if self.sock is not None:
            try:
                send(self.sock, message)
            except OSError as error:
                raise EngineError(
                    f"host {self.facts.name} is gone: {error.strerror or error}"
                ) from None

    def answer(self, timeout_s: float, doing: str) -> msgspec.Struct:
        """EngineError where it gives none, or says that it failed."""
        reply = self._own() if self._line is None else self._read(self._line, timeout_s, doing)
        if isinstance(reply, Failed):
            cause = "".join(it if it.isprintable() else " " for it in reply.cause)
            raise EngineError(f"host {self.facts.name} failed while {doing}: {cause}")
        return reply

    def _own(self) -> msgspec.Struct:
        assert self._host is not None
        assert self._asked is not None
        return self._host.obey(self._asked)

    def _read(self, line: Line, timeout_s: float, doing: str) -> msgspec.Struct:
        name = self.facts.name
        try:
            reply = line.next(timeout_s)
        except EOFError:
            raise EngineError(f"host {name} is gone, while {doing}") from None
        except Nonsense as error:
            raise EngineError(
                f"host {name} gave no answer of this version's preflight, while {doing}: {error}"
            ) from None
        if reply is None:
            raise EngineError(f"host {name} did not answer within {timeout_s:g} s, while {doing}")
        return reply


class Group:
    """Some of those that came, of which each is asked the same."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members

    def send_all(self, command: msgspec.Struct, /) -> None:
        for member in self.members:
            member.tell(command)

    def gather(self, timeout_s: float, doing: str, /) -> list[msgspec.Struct]:
        """The host that listens, which comes first, answers first: while others do their part."""
        return [member.answer(timeout_s, doing) for member in self.members]


def let_in(
    listener: socket.socket,
    own: Host,
    num_hosts: int,
    timeout_s: float,
    came: Callable[[str], None],
) -> list[Member]:
    """This host and those that came in time, in the order of their names behind it. Who says something else than what
    it is, or has another's name, is sent away."""
    found, deadline = [Member(own.facts, None, own)], time.monotonic() + timeout_s
    waiting: dict[socket.socket, Line] = {}
    listener.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while len(found) < num_hosts and (
            events := selector.select(max(0.0, deadline - time.monotonic()))
        ):
            for sock in (key.fileobj for key, _ in events):
                assert isinstance(sock, socket.socket)
                if sock is listener:
                    new, _ = listener.accept()
                    new.settimeout(_SEND_S)
                    waiting[new] = Line(new, PREFLIGHT.replies)
                    selector.register(new, selectors.EVENT_READ)
                elif (facts := _first_words(waiting[sock])) is not None:
                    selector.unregister(sock)
                    del waiting[sock]
                    if _admit(found, facts, sock):
                        came(found[-1].facts.name)
    for sock in waiting:
        sock.close()
    return [found[0], *sorted(found[1:], key=lambda it: it.facts.name)]


def _first_words(line: Line) -> msgspec.Struct | Refused | None:
    """None while they have not come whole."""
    try:
        return line.next(0)
    except EOFError:
        return Refused("it said nothing")
    except Nonsense:
        return Refused("it is no host of this version's preflight")


def _admit(found: list[Member], facts: msgspec.Struct, sock: socket.socket) -> bool:
    names = [member.facts.name for member in found]
    if isinstance(facts, HostFacts) and facts.name not in names:
        found.append(Member(facts, sock, None))
        return True
    why = facts.why if isinstance(facts, Refused) else "it is no host of this version's preflight"
    if isinstance(facts, HostFacts):
        why = f"a host named {facts.name} is there already; give each a --host-name of its own"
    dismiss(sock, Refused(why))
    return False


def dismiss(sock: socket.socket, last: msgspec.Struct) -> None:
    """With a last word, which who is gone already does not need."""
    with sock, suppress(OSError):
        send(sock, last)
