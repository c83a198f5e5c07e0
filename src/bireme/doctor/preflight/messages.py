"""What the host that listens and those that come to it say to each other, and what all of them tell."""

from __future__ import annotations

from typing import Annotated

import msgspec

from bireme.cluster.topology import Point
from bireme.doctor.finding import Finding
from bireme.engine.messages import Clock, Done, Failed, Program, ReadClock
from bireme.planning.probe.messages import Measure, Samples

Printable = Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f\x7f-\x9f]*\Z")]


class Target(msgspec.Struct, frozen=True):
    """Where another host listens for as long as it is checked."""

    name: Printable
    address: Printable
    port: int


class HostFacts(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The first that a host says. `artifact` is its manifest's hash; None where none was given. `device` is what its
    sums are of: 'cpu', or 'cuda'."""

    name: Printable
    address: Printable
    interface: Printable
    port: int
    device: Printable
    versions: dict[Printable, Printable]
    artifact: Printable | None

    @property
    def target(self) -> Target:
        return Target(self.name, self.address, self.port)


class Reach(msgspec.Struct, frozen=True, tag=True):
    """Asks for `Reached`."""

    targets: list[Target]
    timeout_s: float


class Reached(msgspec.Struct, frozen=True, tag=True):
    """Why some cannot be, by their names."""

    failures: dict[Printable, Printable]


class JoinGroup(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """To sum as `rank` of so many, on `device`; the first of them is at `address`."""

    rank: int
    num_ranks: int
    address: str
    port: int
    device: str
    timeout_s: float


class LeaveGroup(msgspec.Struct, frozen=True, tag=True):
    pass


class SumRates(msgspec.Struct, frozen=True, kw_only=True):
    """Of a sum over these hosts, through 'gloo' or 'nccl', by the bytes of each one's tensor."""

    hosts: list[str]
    transport: str
    points: list[Point]


class HostSeen(msgspec.Struct, frozen=True, kw_only=True):
    """A host, how far its clock is ahead of the first one's, to within so much, and why it cannot reach others."""

    facts: HostFacts
    clock_ahead_s: float
    clock_within_s: float
    unreachable: dict[str, str]


class Report(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The last that a host hears; `num_expected` hosts were to come within `timeout_s`.
    `failure`: why they could not sum."""

    num_expected: int
    timeout_s: float
    hosts: list[HostSeen]
    sums: list[SumRates]
    failure: str | None = None
    findings: list[Finding] = []


class Refused(msgspec.Struct, frozen=True, tag=True):
    why: str


Question = Reach | ReadClock | JoinGroup | Measure | LeaveGroup
PREFLIGHT = Program(
    "",  # a command of its own runs it
    msgspec.msgpack.Decoder(Question | Report | Refused),
    msgspec.msgpack.Decoder(HostFacts | Reached | Clock | Done | Samples | Failed),
)
