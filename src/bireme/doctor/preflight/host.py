"""What each host does: says what it is, and what it is asked to by the one that listens."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch

from bireme.checkpoint.artifact import Artifact
from bireme.doctor.preflight.messages import (
    HostFacts,
    JoinGroup,
    LeaveGroup,
    Reach,
    Reached,
    Target,
)
from bireme.doctor.preflight.place import bound, interface_of
from bireme.engine.messages import Clock, Done, ReadClock
from bireme.errors import EngineError
from bireme.parallel.collectives import Communicator, join
from bireme.parallel.meeting import come_to_meeting, hold_meeting
from bireme.planning.probe.measurer import Measurer
from bireme.planning.probe.messages import Measure
from bireme.planning.probe.probe import versions_of
from bireme.trace import SpanRing


class Host:
    """This one, at an address through which the others reach it."""

    def __init__(self, name: str, address: str, device: str, artifact: Path | None) -> None:
        self.facts, self._listener = _facts(name, address, device, artifact)
        self._meeting: socket.socket | None = None
        self._comm: Communicator | None = None
        self._measurer: Measurer | None = None
        self._spans = SpanRing.create(64)

    def close(self) -> None:
        self._leave()
        self._listener.close()
        self._spans.close()

    def obey(self, question: msgspec.Struct) -> msgspec.Struct:
        match question:
            case ReadClock():
                return Clock(time.time_ns())
            case Reach(targets, timeout_s):
                tried = {it.name: _reach(it, timeout_s) for it in targets}
                return Reached({name: why for name, why in tried.items() if why is not None})
            case JoinGroup():
                return self._join(question)
            case Measure() if self._measurer is not None:
                return self._measurer.measure(question)
            case LeaveGroup():
                self._leave()
                return Done()
        raise EngineError(f"{type(question).__name__} was asked of a host that is in no group")

    def open_meeting(self) -> int:
        """The port at which the others of its next group meet this host, which is their first."""
        self._meeting = bound(self.facts.address)
        return int(self._meeting.getsockname()[1])

    def _join(self, asked: JoinGroup) -> Done:
        device = torch.device("cuda:0" if asked.device == "cuda" else "cpu")
        meeting, self._meeting = self._meeting, None
        store = (
            hold_meeting(meeting, asked.timeout_s)
            if meeting is not None
            else come_to_meeting(asked.address, asked.port, asked.timeout_s)
        )
        widths = (asked.num_ranks,)
        self._comm = join(widths, asked.rank, store, device, asked.timeout_s, self._spans)
        self._measurer = Measurer(self._comm, device)
        return Done()

    def _leave(self) -> None:
        comm, self._comm, self._measurer = self._comm, None, None
        if comm is not None:
            comm.leave()
        if self._meeting is not None:
            self._meeting.close()
            self._meeting = None


def _facts(
    name: str, address: str, device: str, artifact: Path | None
) -> tuple[HostFacts, socket.socket]:
    interface = interface_of(address)
    manifest = None if artifact is None else Artifact(artifact).manifest.xxh3
    listener = bound(address)
    found = HostFacts(
        name=name,
        address=address,
        interface=interface,
        port=listener.getsockname()[1],
        device=device,
        versions=versions_of([device]),
        artifact=manifest,
    )
    return found, listener


def _reach(target: Target, timeout_s: float) -> str | None:
    """Why it cannot be; None where it can."""
    try:
        with socket.create_connection((target.address, target.port), timeout_s):
            return None
    except OSError as error:
        return f"{target.address}:{target.port}: {error.strerror or error}"


@contextmanager
def bound_to(interface: str) -> Iterator[None]:
    """gloo and NCCL talk through this interface meanwhile."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    usual = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, interface))
    try:
        yield
    finally:
        for name, value in usual.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
