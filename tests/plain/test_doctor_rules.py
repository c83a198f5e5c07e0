"""Each rule finds its fault, and none where there is none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bireme.doctor.evidence import CacheFacts, Evidence, Measured, Pace, RankFacts
from bireme.doctor.instead import halved
from bireme.doctor.rules import RULES, examine
from bireme.observe.causes import Row
from bireme.observe.profile_records import CollectiveSize, MessageSize
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


def with_late(host: float = 0.0) -> Evidence:
    """`host`: of the time, for which the late rank was not woken."""
    found = evidence("tp")
    ranks = [
        told("rank 0", 0, {Row.COLLECTIVE_WAIT: 0.3}, _1=0.3),
        told("rank 1", 0, {Row.COLLECTIVE_WAIT: 0.05, Row.HOST: host}, _0=0.05),
    ]
    return dataclasses.replace(found, ledger=ToldLedger(1.0, 0.0, ranks))


def with_rank(**more: object) -> Evidence:
    found = evidence("pp")
    first = dataclasses.replace(found.ranks[0], **more)  # type: ignore[arg-type]
    return dataclasses.replace(found, ranks=[first, *found.ranks[1:]])


def collective(**more: object) -> CollectiveSize:
    """A sum of 1,000 bytes that takes 1 ms, 200 of them."""
    given_: dict[str, object] = {
        "kind": "all_reduce", "stage": 0, "num_ranks": 2, "num_bytes": 1000, "count": 200,
        "is_sampled": False, "time_s": 0.2, "move_s": 0.2, "median_s": 1e-3, "median_move_s": 1e-3,
        "overlapped_s": 0.0, "mean_skew_s": 0.0, "median_skew_s": 0.0, "max_skew_s": 0.0,
        "max_skew_by": "rank 1", "late_s": {}, "bytes_per_s": 1e6, "ceiling_bytes_per_s": 1.2e6,
        "ceiling_most_bytes_per_s": 1e9,
    }  # fmt: skip
    return CollectiveSize(**(given_ | more))  # type: ignore[arg-type]


def exposed(**more: object) -> Evidence:
    rows = {Row.COLLECTIVE_MOVE: 0.4}
    return evidence("tp", rows, rows, collectives=[collective(**more)])


def gpus(**more: object) -> Evidence:
    """That do little of what they could, and always compute."""
    found = evidence("tp")
    ranks = [
        dataclasses.replace(rank, device=f"cuda:{index}", **more)  # type: ignore[arg-type]
        for index, rank in enumerate(found.ranks)
    ]
    return dataclasses.replace(found, ranks=ranks)


def batches(own: int, rates: Mapping[int, float], times: Mapping[int, float]) -> dict[str, object]:
    """Arguments of `evidence`."""
    return {
        "batch": own,
        "batches": [Measured(it, rates[it], times[it], 10 * times[it]) for it in rates],
    }


LAUNCHED = gpus(decode_used=(0.01, 0.15))
RATES = {1: 10.0, 4: 40.0, 16: 100.0, 64: 105.0}
TIMES = {1: 0.1, 4: 0.1, 16: 0.16, 64: 0.6}
FAULTS = {
    "launch-bound": LAUNCHED,
    "exposed-collectives": exposed(),
    "allocator": with_rank(device="cuda:0", alloc_retries=2),
    "small-batch": evidence("pp", **batches(4, RATES, TIMES)),
    "large-batch": evidence("pp", **batches(64, RATES, TIMES)),
    "small-chunks": evidence(
        "pp",
        chunk=512,
        largest_step=512,
        chunks=[
            Measured(64, 10.0, 0.1, 1.0),
            Measured(256, 50.0, 0.1, 1.0),
            Measured(512, 90.0, 0.1, 1.0),
        ],
    ),
    "throttled-clocks": with_rank(device="cuda:0", slowdowns={"hw_thermal_slowdown": 0.6}),
    "no-peer-access": evidence("pp", apart=[("rank 0", "rank 1")]),
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


@pytest.mark.parametrize(
    "healthy",
    [
        gpus(decode_used=(0.01, 0.6)),  # memory moves
        gpus(decode_used=(0.4, 0.1)),  # products do
        gpus(),  # nobody measured
        gpus(decode_used=(0.01, 0.15), kernel_share=0.9),  # kernels are slow, not late
        dataclasses.replace(
            LAUNCHED, batches=[Measured(1, 10.0, 0.1, 1.0), Measured(8, 20.0, 0.4, 1.0)]
        ),
        evidence("tp", collectives=[collective()]),
        with_late(host=0.2),
        evidence("pp", **batches(16, RATES, TIMES)),
        evidence("pp", **batches(1, {1: 10.0, 64: 11.0}, {1: 0.1, 64: 0.1})),
        *(
            dataclasses.replace(FAULTS["small-chunks"], largest_step=largest)
            for largest in (None, 400)
        ),
        dataclasses.replace(
            FAULTS["small-chunks"],
            chunks=[Measured(64, 10.0, 0.1, 1.0), Measured(512, 90.0, 0.1, 1.0)],  # none near half
        ),
        dataclasses.replace(
            FAULTS["small-chunks"],
            chunks=[
                Measured(64, 10.0, 0.1, 1.0),
                Measured(256, 85.0, 0.1, 1.0),
                Measured(512, 90.0, 0.1, 1.0),
            ],
        ),
        dataclasses.replace(FAULTS["few-requests"], is_slower_with_more=True),
        with_rank(device="cuda:0", slowdowns={"hw_slowdown": 0.01}),
        with_rank(device="cuda:0", reserved_bytes=110, memory={"cache": 60, "activations": 40}),
    ],
)
def test_what_is_near_a_fault_is_none(healthy: Evidence) -> None:
    assert [finding for finding in examine(healthy) if finding.rule != "uneven-memory"] == []


def test_kernels_that_hardly_run_tell_of_launches_without_any_ceiling() -> None:
    (finding,) = examine(gpus(kernel_share=0.3))
    assert finding.rule == "launch-bound"
    assert "kernels ran 30% of the time" in finding.figure


def test_an_allocator_that_holds_more_than_the_cache_for_nobody_is_named() -> None:
    (finding,) = examine(
        with_rank(device="cuda:0", reserved_bytes=100 << 20, memory={"cache": 20 << 20})
    )
    assert finding.rule == "allocator"
    assert "80.0 MiB were used by no weights" in finding.figure


def test_what_would_help_sums_is_told_by_what_they_take_alone() -> None:
    def remedy(**more: object) -> str:
        (finding,) = examine(exposed(**more))
        return finding.remedy

    assert "send larger batches" in remedy()
    assert "see what else uses the link" in remedy(ceiling_bytes_per_s=1e8)
    assert "as quick as the link" in remedy(ceiling_most_bytes_per_s=1.3e6)


def test_a_batch_is_told_with_what_another_would_bring() -> None:
    (finding,) = examine(FAULTS["small-batch"])
    assert "batches of 16 give 100, 150% more" in finding.figure
    (open_ended,) = examine(evidence("pp", **batches(1, {1: 10.0, 8: 80.0}, {1: 0.1, 8: 0.1})))
    assert "batches of 8 or more give 80" in open_ended.figure


PACE = Pace(output_tokens_per_s=100.0, itl_s=0.1, num_steps=10, num_output_tokens=100)


def test_half_the_width_is_calculated_as_the_docs_say() -> None:
    """Steps of 100 ms: 40 in compute, 50 in sums, 10 in the host; 200 sums took 0.2 s, so one takes 1 ms."""
    rows = {Row.COLLECTIVE_MOVE: 0.5, Row.HOST: 0.1}
    found = halved(evidence("tp", rows, rows, pace=PACE, collectives=[collective()]))
    assert found is not None
    assert (found.tp, found.pp) == (1, 2)
    assert found.output_tokens_per_s == pytest.approx(10 / 0.051)
    assert found.token_s == pytest.approx(2 * 0.051)
    assert found.gain == pytest.approx(100 / 51)


def test_a_ledger_of_the_last_steps_changes_nothing_of_it() -> None:
    rows = {Row.COLLECTIVE_MOVE: 0.5, Row.HOST: 0.1}
    whole = evidence("tp", rows, rows, pace=PACE, collectives=[collective()])
    last = dataclasses.replace(whole, ledger=ToldLedger(0.1, 0.0, whole.ledger.ranks))  # type: ignore[union-attr]
    assert halved(last) == halved(whole)


def test_sums_of_what_is_left_of_the_width_stay() -> None:
    """Of four ranks to two: half the layers, and 1 for 1.5 of a tensor a sum; messages are known."""
    rows = {Row.COLLECTIVE_MOVE: 0.6}
    ranks = [RankFacts(name=f"rank {it}", stage=it // 4, device="cpu") for it in range(8)]
    message = MessageSize(
        src_stage=0, dst_stage=1, num_bytes=10, count=10, time_s=0.05, median_s=0.005
    )
    found = halved(
        Evidence(
            source="x", ranks=ranks, pace=PACE, messages=[message],
            ledger=ToldLedger(1.0, 0.0, [told(it.name, it.stage, rows) for it in ranks]),
        )
    )  # fmt: skip
    assert found is not None
    assert (found.tp, found.pp) == (2, 4)
    assert found.token_s == pytest.approx(4 * (0.04 + 0.06 / 2 / 1.5 + 0.005))


def test_both_numbers_are_in_the_finding_and_called_calculated() -> None:
    rows = {Row.COLLECTIVE_MOVE: 0.6}
    (finding,) = examine(evidence("tp", rows, rows, pace=PACE, collectives=[collective()]))
    assert finding.rule == "slow-link"
    assert finding.remedy.startswith("use -tp 1 -pp 2:")
    assert finding.remedy.endswith(
        "calculated for -tp 1 -pp 2 and twice as many requests at once: 244 tokens/s of output instead of 100, "
        "82.0 ms a token instead of 100.0"
    )
