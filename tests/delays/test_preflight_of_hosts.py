"""Two hosts, which are network namespaces, and a link between them that is as slow as it is told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hosts import LINK, Hosts

from preflight import Place, check_together

pytestmark = pytest.mark.slow

SLOW_BYTES_PER_S = 20_000_000


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts() as made:
        yield made


def places(hosts: Hosts) -> list[Place]:
    return [
        Place(f"10.99.0.{index + 1}", within=["ip", "netns", "exec", name])
        for index, name in enumerate(hosts.names)
    ]


def test_hosts_that_reach_each_other_are_well(hosts: Hosts) -> None:
    one, other = check_together(*places(hosts))
    assert (one.status, other.status) == (0, 0), one.out + one.err + other.err
    assert one.report == other.report
    assert {host["facts"]["interface"] for host in one.report["hosts"]} == {LINK}


def test_a_slow_link_is_told_with_what_it_carries(hosts: Hosts) -> None:
    with hosts.shaped(SLOW_BYTES_PER_S):
        one, other = check_together(*places(hosts))
    assert (one.status, other.status) == (1, 1), one.out + one.err + other.err
    assert one.rules == ["slow-network"]
    (sums,) = one.report["sums"]
    num_bytes, seconds, *_ = sums["points"][-1]
    assert num_bytes / seconds == pytest.approx(SLOW_BYTES_PER_S, rel=0.2)
