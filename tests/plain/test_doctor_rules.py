"""Each rule finds its fault, and none where there is none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bireme.doctor.evidence import CacheFacts, Evidence, RankFacts
from bireme.doctor.rules import RULES, examine
from bireme.observe.causes import Row
from bireme.observe.told import ToldLedger, ToldRank

ROOT = Path(__file__).parents[2]
WIDTHS = {"pp": (1, 1), "tp": (2,)}


def told(name: str, stage: int, shares: Mapping[Row, float], **late: float) -> ToldRank:
    """What is left is work."""
    found = {row.value: shares.get(row, 0.0) for row in Row}
    found[Row.COMPUTE] = 1.0 - sum(found.values())
    return ToldRank(
        name, stage, found, {f"rank {key[1:]}": it for key, it in late.items()}, 0.0, False, ""
    )


def evidence(layout: str, *shares: Mapping[Row, float], **more: object) -> Evidence:
    stages = [stage for stage, width in enumerate(WIDTHS[layout]) for _ in range(width)]
    ranks = [
        RankFacts(name=f"rank {rank}", stage=stage, device="cpu", num_threads=1, major_faults=0)
        for rank, stage in enumerate(stages)
    ]
    own = [
        told(rank.name, rank.stage, it) for rank, it in zip(ranks, shares or ({}, {}), strict=True)
    ]
    given_: dict[str, object] = {
        "ledger": ToldLedger(1.0, 0.0, own), "num_cores": 2, "num_running": 1.0,
        "cache": CacheFacts.of([(0.5, 0), (0.97, 0), (0.5, 3)], 0, None),
    }  # fmt: skip
    return Evidence(source="x", ranks=ranks, **(given_ | more))  # type: ignore[arg-type]


def with_late() -> Evidence:
    found = evidence("tp")
    ranks = [
        told("rank 0", 0, {Row.COLLECTIVE_WAIT: 0.3}, _1=0.3),
        told("rank 1", 0, {Row.COLLECTIVE_WAIT: 0.05}, _0=0.05),
    ]
    return dataclasses.replace(found, ledger=ToldLedger(1.0, 0.0, ranks))


def with_rank(**more: object) -> Evidence:
    found = evidence("pp")
    first = dataclasses.replace(found.ranks[0], **more)  # type: ignore[arg-type]
    return dataclasses.replace(found, ranks=[first, *found.ranks[1:]])


FAULTS = {
    "damaged-files": evidence("pp", damage=["rank-1 is cut"]),
    "wrong-model": evidence("pp", departures=["layer 3, rank 1"]),
    "uneven-memory": with_rank(memory={"weights": 100}),
    "slow-stage": evidence("pp", {Row.IMBALANCE: 0.7}, {}),
    "few-requests": evidence("pp", {Row.TOKEN_DEPENDENCY: 0.5}, {Row.TOKEN_DEPENDENCY: 0.5}),
    "slow-host": evidence("pp", {Row.HOST: 0.5}, {Row.HOST: 0.5}),
    "late-rank": with_late(),
    "slow-link": evidence("tp", {Row.COLLECTIVE_MOVE: 0.6}, {Row.COLLECTIVE_MOVE: 0.6}),
    "slow-hand-over": evidence("pp", {Row.TRANSFER: 0.5}, {Row.TRANSFER: 0.4}),
    "paging": with_rank(major_faults=5000),
    "small-cache": evidence("pp", cache=CacheFacts.of([(1.0, 2)], 0, 3.5)),
    "too-many-threads": with_rank(num_threads=2),
    "nccl-settings": with_rank(device="cuda:0"),
}
FAULTS["nccl-settings"] = dataclasses.replace(
    FAULTS["nccl-settings"], environment={"NCCL_P2P_DISABLE": "1"}
)


@pytest.mark.parametrize("rule", RULES)
def test_a_fault_is_found_by_its_rule_and_by_no_other(rule: str) -> None:
    (finding,) = examine(FAULTS[rule])
    assert finding.rule == rule
    assert f"\n## {rule}\n" in (ROOT / "docs/doctor.md").read_text()


@pytest.mark.parametrize("layout", WIDTHS)
def test_nothing_is_found_where_all_work(layout: str) -> None:
    assert examine(evidence(layout)) == []
    assert examine(evidence(layout, {Row.STARVED: 1.0}, {Row.STARVED: 1.0})) == []


def test_shares_are_of_the_time_in_which_there_was_work() -> None:
    rows = {Row.STARVED: 0.9, Row.HOST: 0.05}
    (finding,) = examine(evidence("pp", rows, rows))
    assert (finding.rule, round(finding.share, 6)) == ("slow-host", 0.5)


def test_what_costs_most_comes_first_and_what_cannot_be_trusted_before_it() -> None:
    rows = {Row.HOST: 0.42, Row.TOKEN_DEPENDENCY: 0.45}
    found = examine(evidence("pp", rows, rows, damage=["x"]))
    assert [finding.rule for finding in found] == ["damaged-files", "few-requests", "slow-host"]


@given(
    st.lists(st.floats(0, 1), min_size=2 * len(Row), max_size=2 * len(Row)),
    st.sampled_from([*WIDTHS]),
)
def test_any_ledger_can_be_examined(numbers: list[float], layout: str) -> None:
    halves = numbers[: len(Row)], numbers[len(Row) :]
    shares = [
        {row: it / max(sum(half), 1.0) for row, it in zip(Row, half, strict=True)}
        for half in halves
    ]
    for finding in examine(evidence(layout, *shares)):
        assert finding.rule in RULES
        assert 0 <= finding.share <= 1 + 1e-9


def test_what_nobody_measured_is_no_fault() -> None:
    assert examine(Evidence(source="x", ranks=())) == []
