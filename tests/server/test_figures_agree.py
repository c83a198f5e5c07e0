"""The same quantity is the same number wherever it is told, on one run of a real server: `/metrics`, the live
page and its events, the ledger, the trace with what a report makes of it, and the client's benchmark.

Equal means equal, to the nanosecond and the byte; what a person reads is rounded as its place says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import msgspec
import pytest
from one_run import CHROMIUM, NUM_REQUESTS, Run, num_submits, one_run

from bireme.chrome_trace import Recorded, chrome_trace, read_chrome_trace
from bireme.observe.causes import Row
from bireme.observe.exchanges import collective_sizes, message_sizes
from bireme.observe.ledger import make_ledger
from bireme.observe.run_records import RunLedger
from bireme.observe.told import ToldLedger
from bireme.trace import Span, SpanKind

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to draw pages with")


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with one_run() as found:
        yield found


def test_requests_and_tokens(run: Run) -> None:
    bench, counts, lists = run.bench, run.moment["counts"], run.bench["itls"]
    counted, histograms = counts["counters"], counts["histograms"]
    ended = sum(
        value for (name, _), value in run.metrics.items() if name == "request_success_total"
    )
    requests = [
        bench["completed"], ended, one(run, "e2e_request_latency_seconds_count"),
        one(run, "time_to_first_token_seconds_count"), one(run, "request_prompt_tokens_count"),
        histograms["e2e_request_latency_seconds"]["counts"][-1],
    ]  # fmt: skip
    assert requests == [NUM_REQUESTS] * len(requests)
    prompts = {
        bench["total_input_tokens"], sum(bench["input_lens"]), one(run, "prompt_tokens_total"),
        one(run, "request_prompt_tokens_sum"), counted["prompt_tokens_total"],
        histograms["request_prompt_tokens"]["sum"],
    }  # fmt: skip
    generated = {
        bench["total_output_tokens"], sum(bench["output_lens"]), one(run, "generation_tokens_total"),
        one(run, "request_generation_tokens_sum"), counted["generation_tokens_total"],
        histograms["request_generation_tokens"]["sum"],
    }  # fmt: skip
    assert (len(prompts), len(generated)) == (1, 1)
    gaps = [
        generated.pop() - NUM_REQUESTS, one(run, "inter_token_latency_seconds_count"),
        histograms["inter_token_latency_seconds"]["counts"][-1],
    ]  # fmt: skip
    assert gaps[1:] == gaps[:1] * 2
    assert sum(map(len, lists)) <= gaps[0], "of pieces, which may hold several tokens"


def test_what_the_engine_counts(run: Run) -> None:
    stats = run.moment["stats"]
    for name, told in {
        "num_preemptions_total": "num_preemptions_total",
        "prefix_cache_queries_total": "prefix_queries_total",
        "prefix_cache_hits_total": "prefix_hits_total",
        "num_requests_running": "num_running",
        "num_requests_waiting": "num_waiting",
        "kv_cache_usage_perc": "cache_usage",
    }.items():
        assert one(run, name) == stats[told], name
    assert stats["num_preemptions_total"] > 0, "the cache is too small for all of them"


def test_steps(run: Run) -> None:
    """The first of a rank is made up, before there is anybody to submit any."""
    steps = {
        *(sum(it.kind is SpanKind.STEP for it in rank.spans) for rank in run.recorded.ranks),
        *(rank["num_steps_total"] for rank in run.moment["stats"]["ranks"]),
        *(of_rank(run, index, "rank_steps_total") for index in range(4)),
        1 + num_submits(run.recorded.engine),
    }
    assert len(steps) == 1


def test_seconds_and_bytes_of_ranks(run: Run, tmp_path: Path) -> None:
    """Of all steps, the first with them."""
    recorded = on_disk(run.recorded, tmp_path)
    found = RunLedger.of(make_ledger(recorded, start_ns=0))
    collectives, messages = collective_sizes(recorded, None), message_sizes(recorded, None)
    for index, (rank, stats) in enumerate(
        zip(found.ranks, run.moment["stats"]["ranks"], strict=True)
    ):
        in_collectives = rank.ns[Row.COLLECTIVE_WAIT] + rank.ns[Row.COLLECTIVE_MOVE]
        summed = sum(it.total_bytes for it in collectives if it.stage == rank.stage)
        received = sum(it.num_bytes * it.count for it in messages if it.dst_stage == rank.stage)
        for name, told, value in (
            ("rank_busy_seconds_total", "busy_s", rank.ns[Row.COMPUTE] / 1e9),
            ("rank_collective_seconds_total", "collective_s", in_collectives / 1e9),
            ("rank_collective_bytes_total", "collective_bytes", summed),
        ):
            assert of_rank(run, index, name) == stats[told] == value, name
        taken = of_rank(run, index, "rank_transferred_bytes_total", direction="receive")
        assert taken == stats["received_bytes"] == received / 2  # by both of a stage


def test_latencies_of_the_page_are_quantiles_of_the_metrics(run: Run) -> None:
    """To the three digits that it shows."""
    for short, name in (
        ("TTFT", "time_to_first_token_seconds"),
        ("ITL", "inter_token_latency_seconds"),
    ):
        for percent in (50, 99):
            shown, unit = run.figures[f"{short} p{percent}"].split(" ")
            seconds = float(shown) * {"s": 1.0, "ms": 1e-3, "µs": 1e-6}[unit]
            assert seconds == pytest.approx(quantile(run, name, percent / 100), rel=0.005)


def test_latencies_of_the_client_hold_those_of_the_server(run: Run) -> None:
    """Which counts from when a request came to when the engine had its token."""
    for lists, name in (("ttfts", "time_to_first_token"), ("latencies", "e2e_request_latency")):
        inside = one(run, f"{name}_seconds_sum")
        assert inside < sum(run.bench[lists])
    in_order = sorted(run.bench["ttfts"])
    assert run.bench["p99_ttft_ms"] <= 1e3 * in_order[-1]
    assert run.bench["median_ttft_ms"] == pytest.approx(1e3 * median(in_order))


def test_the_ledger_of_a_run_is_that_of_its_trace(run: Run, tmp_path: Path) -> None:
    start_ns = min(span.start_ns for span in run.recorded.engine)
    end_ns = start_ns + round(run.whole.seconds * 1e9)
    idle_ns = max(span.end_ns for span in run.recorded.engine)
    idle = Span(SpanKind.EMPTY, idle_ns, end_ns, 0, 0, 0)  # goes on, and so is not written yet
    recorded = replace(run.recorded, engine=[*run.recorded.engine, idle])
    assert run.whole == told(recorded, start_ns, end_ns, tmp_path)
    assert all(rank.shares[Row.UNATTRIBUTED] < 0.01 for rank in run.whole.ranks)


def test_the_ledger_of_the_last_steps(run: Run, tmp_path: Path) -> None:
    seconds = run.last_told.seconds
    start_ns = run.last_ns - round(seconds * 1e9)
    expected = told(run.last_recorded, start_ns, run.last_ns, tmp_path)
    assert run.last_told.ranks == expected.ranks
    shown = run.last_moment["ledger"]
    assert shown["seconds"] == seconds < 1
    rows = {row for rank in expected.ranks for row, share in rank.shares.items() if share >= 0.0005}
    for rank, there, cells in zip(expected.ranks, shown["ranks"], run.last_table[1:], strict=True):
        assert {name: there[name] for name in ("shares", "late", "overlapped")} == {
            "shares": rank.shares, "late": rank.late, "overlapped": rank.overlapped
        }  # fmt: skip
        assert rank.shares[Row.COMPUTE] > 0
        assert cells[0] == rank.name
        percents = {f"{100 * share:.1f} %" for row, share in rank.shares.items() if row in rows}
        assert set(cells[1:]) == percents


def test_the_ledger_of_a_server_at_rest(run: Run) -> None:
    for index, rank in enumerate(run.moment["ledger"]["ranks"]):
        for row, share in rank["shares"].items():
            assert of_rank(run, index, "ledger_share", row=row) == share == (row == Row.STARVED)


# --- by name ----------------------------------------------------------------------------------


def one(run: Run, name: str) -> float:
    return run.metrics[name, frozenset()]


def of_rank(run: Run, index: int, name: str, **labels: str) -> float:
    stage = run.recorded.ranks[index].stage
    return run.metrics[name, frozenset({"stage": str(stage), "rank": str(index), **labels}.items())]


def quantile(run: Run, name: str, share: float) -> float:
    """As Prometheus' histogram_quantile."""
    found = sorted(
        (float(dict(labels)["le"]), count)
        for (it, labels), count in run.metrics.items()
        if it == f"{name}_bucket"
    )
    wanted, (low, below) = share * found[-1][1], (0.0, 0.0)
    for bound, count in found:
        if count >= wanted:
            return low + (bound - low) * (wanted - below) / (count - below)
        low, below = bound, count
    raise AssertionError("the last bucket holds all")


def on_disk(recorded: Recorded, folder: Path) -> Recorded:
    path = folder / "trace.json"
    path.write_bytes(msgspec.json.encode(chrome_trace(recorded)))
    return read_chrome_trace(path)


def told(recorded: Recorded, start_ns: int, end_ns: int, folder: Path) -> ToldLedger:
    """As a report tells it, of the trace on disk."""
    begin_ns = recorded.start_ns
    found = make_ledger(on_disk(recorded, folder), start_ns - begin_ns, end_ns - begin_ns)
    return RunLedger.of(found).told
