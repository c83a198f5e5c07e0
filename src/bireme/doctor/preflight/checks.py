"""The checks, of the host that listens and of one that comes to it."""

from __future__ import annotations

import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec

from bireme.doctor.preflight.findings import examine_hosts
from bireme.doctor.preflight.host import Host, bound_to
from bireme.doctor.preflight.hosts import Group, Member, let_in
from bireme.doctor.preflight.line import Line, Nonsense
from bireme.doctor.preflight.messages import (
    PREFLIGHT,
    HostSeen,
    JoinGroup,
    LeaveGroup,
    Reach,
    Reached,
    Refused,
    Report,
    SumRates,
)
from bireme.engine.clocks import Look, quickest
from bireme.engine.messages import Clock, Failed, ReadClock, send
from bireme.errors import EngineError, PeerLost, RequestError
from bireme.planning.probe.driver import Probed, carrier
from bireme.planning.probe.messages import AllReduce

_ANSWER_S = 120.0
_JOIN_S = 60.0
_REACH_S = 5.0
_BUDGET_S = 0.3  # of one size of sums
_SIZES = (4 << 10, 64 << 10, 1 << 20, 8 << 20)  # bytes of each host's tensor


def listen(
    listener: socket.socket,
    own: Host,
    num_hosts: int,
    timeout_s: float,
    came: Callable[[str], None],
) -> Report:
    """What is found of this host and of those that come; all are told."""
    members = let_in(listener, own, num_hosts, timeout_s, came)
    everyone = Group(members)
    try:
        seen, sums, failure = _seen(everyone), list[SumRates](), None
        if len(members) > 1 and not any(host.unreachable for host in seen):
            try:
                with bound_to(own.facts.interface):
                    sums = [_sums(own, group) for group in _groups(members)]
            except EngineError as error:
                failure = str(error)
        report = Report(
            num_expected=num_hosts, timeout_s=timeout_s, hosts=seen, sums=sums, failure=failure
        )
        report = msgspec.structs.replace(report, findings=examine_hosts(report))
        everyone.send_all(report)
        return report
    finally:
        for member in members:
            if member.sock is not None:
                member.sock.close()


def come(sock: socket.socket, own: Host, place: str, timeout_s: float) -> Report:
    """Does what the host that listens at `place` asks for, until it tells what was found. RequestError where it does
    not let this one in or is none, EngineError where it is gone before, or says nothing for so long."""
    line = Line(sock, PREFLIGHT.commands)
    sock.settimeout(timeout_s)
    _say(sock, own.facts, place)
    with bound_to(own.facts.interface):
        while True:
            question = _asked(line, place, timeout_s)
            match question:
                case Report():
                    return question
                case Refused(why):
                    raise RequestError(
                        f"the host that listens does not let {own.facts.name} in: {why}"
                    )
            _say(sock, _obeyed(own, question), place)


def _say(sock: socket.socket, message: msgspec.Struct, place: str) -> None:
    try:
        send(sock, message)
    except OSError as error:
        raise EngineError(
            f"the host that listens at {place} is gone: {error.strerror or error}; see what it says"
        ) from None


def _asked(line: Line, place: str, timeout_s: float) -> msgspec.Struct:
    try:
        question = line.next(timeout_s)
    except EOFError:
        raise EngineError(f"the host that listens at {place} is gone; see what it says") from None
    except Nonsense as error:
        raise RequestError(
            f"what listens at {place} is no bireme doctor --preflight of this version: {error}"
        ) from None
    if question is None:
        raise EngineError(
            f"what listens at {place} said nothing for {timeout_s:g} s; see that it is bireme doctor --preflight "
            "--listen, and give a --timeout at least as long as there"
        )
    return question


def _obeyed(own: Host, question: msgspec.Struct) -> msgspec.Struct:
    try:
        return own.obey(question)
    except Exception as error:  # every failure becomes a message to the host that asked
        return Failed(
            cause=f"{type(error).__name__}: {error}",
            traceback=traceback.format_exc(),
            is_user_error=False,
            is_secondary=isinstance(error, PeerLost),
        )


def _seen(everyone: Group) -> list[HostSeen]:
    targets = [member.facts.target for member in everyone.members]
    everyone.send_all(Reach(targets, _REACH_S))
    reached = everyone.gather(_ANSWER_S, "reaching the others")
    looks = [quickest(lambda member=member: _look(member)) for member in everyone.members]  # type: ignore[misc]
    return [
        HostSeen(
            facts=member.facts,
            clock_ahead_s=0.0 - look.behind_ns[0] / 1e9,
            clock_within_s=look.within_ns / 1e9,
            unreachable=answer.failures if isinstance(answer, Reached) else {},
        )
        for member, answer, look in zip(everyone.members, reached, looks, strict=True)
    ]


def _look(member: Member) -> Look:
    """At one's clock of the day: what logs and certificates go by."""
    start_ns = time.time_ns()
    member.tell(ReadClock())
    reply = member.answer(_ANSWER_S, "reading its clock")
    end_ns = time.time_ns()
    if not isinstance(reply, Clock):
        raise EngineError(f"host {member.facts.name} told {type(reply).__name__}, not its clock")
    return Look(start_ns, end_ns, [reply.ns])


def _groups(members: Sequence[Member]) -> Iterator[Group]:
    """Each with the host that listens, so that a slow one is told by its name, and all."""
    if len(members) > 2:
        yield from (Group([members[0], other]) for other in members[1:])
    yield Group(members)


def _sums(own: Host, group: Group) -> SumRates:
    facts = [member.facts for member in group.members]
    device = "cuda" if all(it.device == "cuda" for it in facts) else "cpu"
    with _joined(own, group, device):
        ranks = Probed(group)
        points = [ranks.shared(AllReduce(size), size, _BUDGET_S) for size in _SIZES]
    names = [it.name for it in facts]
    return SumRates(hosts=names, transport=carrier([device], "distributed"), points=points)


@contextmanager
def _joined(own: Host, group: Group, device: str) -> Iterator[None]:
    port = own.open_meeting()
    for rank, member in enumerate(group.members):
        member.tell(
            JoinGroup(
                rank=rank,
                num_ranks=len(group.members),
                address=own.facts.address,
                port=port,
                device=device,
                timeout_s=_JOIN_S,
            )
        )
    group.gather(_ANSWER_S, "joining the others")
    yield
    group.send_all(LeaveGroup())
    group.gather(_ANSWER_S, "leaving the others")
