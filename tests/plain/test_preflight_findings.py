"""What is wrong with hosts that were checked: each rule finds its fault, and none where there is none."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from bireme.cluster.topology import Point
from bireme.doctor.preflight.findings import RULES, examine_hosts
from bireme.doctor.preflight.host import Host
from bireme.doctor.preflight.messages import (
    HostFacts,
    HostSeen,
    Reach,
    Reached,
    Report,
    SumRates,
    Target,
)
from bireme.doctor.preflight.place import interface_of, parse_address
from bireme.errors import RequestError

ROOT = Path(__file__).parents[2]


def host(
    name: str, *, ahead_s: float = 0.0, unreachable: dict[str, str] | None = None, **more: object
) -> HostSeen:
    given: dict[str, object] = {
        "name": name, "address": "10.0.0.1", "interface": "eth0", "port": 1, "device": "cpu",
        "versions": {"torch": "2.11"}, "artifact": "aa",
    }  # fmt: skip
    facts = HostFacts(**(given | more))  # type: ignore[arg-type]
    return HostSeen(
        facts=facts, clock_ahead_s=ahead_s, clock_within_s=0.001, unreachable=unreachable or {}
    )


SMALL, LARGE = Point(4096, 1e-4, 0.5e-4, 2e-4), Point(1 << 20, 1e-3, 0.5e-3, 2e-3)


def report(
    *hosts: HostSeen, num_expected: int = 2, small: Point = SMALL, large: Point = LARGE
) -> Report:
    rates = SumRates(hosts=["a", "b"], transport="gloo", points=[small, large])
    return Report(num_expected=num_expected, timeout_s=5.0, hosts=list(hosts), sums=[rates])


WELL = report(host("a"), host("b"))
FAULTS = {
    "unreachable": report(host("a", unreachable={"b": "10.0.0.1:1: timed out"}), host("b")),
    "versions-differ": report(host("a"), host("b", versions={"torch": "2.10"})),
    "artifacts-differ": report(host("a"), host("b", artifact=None)),
    "clock-offset": report(host("a"), host("b", ahead_s=-0.5)),
    "slow-network": report(host("a"), host("b"), large=Point(1 << 20, 0.1)),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_fault_is_found_by_its_rule_and_by_no_other(rule: str) -> None:
    (finding,) = examine_hosts(FAULTS[rule])
    assert finding.rule == rule
    assert f"\n## {rule}\n" in (ROOT / "docs/doctor.md").read_text()


def test_nothing_is_found_where_all_is_well() -> None:
    assert examine_hosts(WELL) == []
    assert examine_hosts(report(host("a"), host("b", ahead_s=0.05))) == []


def test_a_network_of_a_late_answer_is_slow_and_that_of_a_busy_host_is_not() -> None:
    late = report(host("a"), host("b"), small=Point(4096, 4e-3, 3e-3, 5e-3))
    (finding,) = examine_hosts(late)
    assert finding.rule == "slow-network"
    assert "3.00 ms of 4.0 KiB, where 2 is much" in finding.figure
    assert examine_hosts(report(host("a"), host("b"), small=Point(4096, 4e-3, 1e-3, 5e-3))) == []


def test_a_version_that_one_has_not_is_another() -> None:
    (finding,) = examine_hosts(
        report(host("a"), host("b", versions={"torch": "2.11", "nccl": "2.28"}))
    )
    assert finding.figure == "a none, b 2.28"


def test_hosts_that_cannot_sum_are_told_by_what_stopped_them() -> None:
    (finding,) = examine_hosts(
        msgspec.structs.replace(WELL, failure="host b failed: PeerLost: refused")
    )
    assert (finding.rule, finding.figure) == ("unreachable", "host b failed: PeerLost: refused")


def test_where_nobody_listens_nobody_is_reached() -> None:
    own = Host("a", "127.0.0.1", "cpu", None)
    try:
        nowhere = Target("b", "127.0.0.1", 1)
        answer = own.obey(Reach([own.facts.target, nowhere], 1.0))
    finally:
        own.close()
    assert answer == Reached({"b": "127.0.0.1:1: Connection refused"})


@pytest.mark.parametrize(
    ("text", "port", "found"),
    [
        ("127.0.0.1:80", None, ("127.0.0.1", 80)),
        ("127.0.0.1", 0, ("127.0.0.1", 0)),
        ("[::1]:80", None, ("::1", 80)),
        ("[::1]", 0, ("::1", 0)),
        ("::1", 0, ("::1", 0)),
    ],
)
def test_addresses_are_read(text: str, port: int | None, found: tuple[str, int]) -> None:
    assert parse_address(text, "listen", port) == found


@pytest.mark.parametrize("text", ["", "127.0.0.1", ":80", "::1", "127.0.0.1:x", "127.0.0.1:65536"])
def test_what_is_no_address_and_port_is_told(text: str) -> None:
    with pytest.raises(RequestError, match="is no address; give ADDRESS:PORT"):
        parse_address(text, "join")


def test_the_interface_of_an_address_is_known() -> None:
    assert interface_of("127.0.0.2") == "lo"
    with pytest.raises(RequestError, match="is at no interface of this host"):
        interface_of("203.0.113.7")
