"""What is told of a load run, from made-up sights of its requests."""

from __future__ import annotations

import json
from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bireme.bench.answer import Answer, Sent
from bireme.bench.load import LoadResult
from bireme.bench.serving_metrics import Wanted, per_request, summarise
from bireme.errors import RequestError


def sent(
    index: int, ttft_s: float, *gaps: float, tokens: int | None = None, error: str = ""
) -> Sent:
    answer = Answer(
        num_input_tokens=10,
        num_output_tokens=tokens or 1 + len(gaps),
        ttft_s=ttft_s,
        latency_s=ttft_s + sum(gaps),
        itls=array("d", gaps),
        text=f"answer {index}",
        error=error,
    )
    return Sent(index, float(index), 0.001 * index, 0.0, answer)


RUN = LoadResult(
    [sent(1, 0.3, 0.1, 0.1), sent(0, 0.1, 0.2), sent(3, 9, error="500 no"), sent(2, 0.2)],
    10.0,
    0.25,
)
SECONDS = st.floats(1e-6, 100)


def test_counts_and_rates_leave_failed_requests_out() -> None:
    found = summarise(RUN, Wanted())
    assert (found["completed"], found["failed"]) == (3, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (30, 6)
    assert found["request_throughput"] == 0.3
    assert found["output_throughput"] == 0.6
    assert found["total_token_throughput"] == 3.6
    assert found["request_goodput"] is None
    assert found["generator_cpu_share"] == 0.25
    assert found["max_lag_ms"] == pytest.approx(3)


def test_times_are_those_of_the_requests() -> None:
    found = summarise(RUN, Wanted(percentiles=(50, 99.9)))
    assert found["mean_ttft_ms"] == pytest.approx(200)
    assert found["median_e2el_ms"] == found["p50_e2el_ms"] == pytest.approx(300)
    assert found["mean_tpot_ms"] == pytest.approx(150)
    assert found["mean_itl_ms"] == pytest.approx(400 / 3)
    assert found["std_ttft_ms"] == pytest.approx(1000 * np.std([0.3, 0.1, 0.2]))
    assert "p99.9_itl_ms" in found
    assert "mean_client_queue_time_ms" not in found


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(SECONDS, st.lists(SECONDS, max_size=20)), min_size=1, max_size=20))
def test_percentiles_grow_and_frame_the_median(times: list[tuple[float, list[float]]]) -> None:
    run = LoadResult([sent(i, ttft, *gaps) for i, (ttft, gaps) in enumerate(times)], 1.0, 0.0)
    found = summarise(run, Wanted(percentiles=(0, 50, 90, 99, 100)))
    for metric in ("ttft", "e2el"):
        spread = [found[f"p{share}_{metric}_ms"] for share in (0, 50, 90, 99, 100)]
        assert spread == sorted(spread)
        assert found[f"median_{metric}_ms"] == pytest.approx(spread[1])
        assert spread[0] * 0.999 <= found[f"mean_{metric}_ms"] <= spread[-1] * 1.001
    assert 1 <= found["max_concurrent_requests"] <= len(times)
    assert 0 < found["max_output_tokens_per_s"] <= found["total_output_tokens"] + 1e-6


@pytest.mark.parametrize(
    ("objectives", "met"),
    [
        ({"ttft": 200}, 2),
        ({"ttft": 1000, "tpot": 150}, 2),
        ({"tpot": 0}, 1),
        ({"e2el": 299}, 1),
        ({"ttft": 0}, 0),
    ],
)
def test_goodput_counts_requests_that_meet_all_objectives(
    objectives: dict[str, float], met: int
) -> None:
    assert summarise(RUN, Wanted(objectives=objectives))["request_goodput"] == met / 10


def test_costs_are_of_all_devices_for_the_whole_run() -> None:
    found = summarise(RUN, Wanted(price_per_device_hour=3.6, num_devices=2))
    cost = 3.6 * 2 * 10 / 3600
    assert found["cost_per_1000_queries"] == pytest.approx(cost / 3 * 1000)
    assert found["cost_per_million_tokens"] == pytest.approx(cost / 36 * 1e6)
    assert found["cost_per_million_output_tokens"] == pytest.approx(cost / 6 * 1e6)


def test_a_run_without_any_answer_has_no_times_and_no_cost_a_query() -> None:
    run = LoadResult([sent(0, 0.0, error="refused")], 1.0, 0.0)
    found = summarise(run, Wanted(price_per_device_hour=1))
    assert found["mean_ttft_ms"] is None
    assert found["cost_per_1000_queries"] is None
    assert found["max_concurrent_requests"] == 0
    assert json.loads(json.dumps(found))["p99_itl_ms"] is None


def test_concurrency_at_its_peak_and_tokens_of_the_best_second() -> None:
    run = LoadResult([sent(0, 1.0), sent(1, 0.5, 0.1, 0.1, tokens=6), sent(2, 0.1)], 3.0, 0.0)
    found = summarise(run, Wanted())
    assert found["max_concurrent_requests"] == 1
    assert found["max_output_tokens_per_s"] == 7  # the first answer comes as the second is sent


def test_lists_are_in_the_order_of_sending() -> None:
    found = per_request(RUN)
    assert found["generated_texts"] == [f"answer {index}" for index in range(4)]
    assert found["output_lens"] == [2, 3, 1, 0]
    assert found["itls"][1] == [0.1, 0.1]
    assert found["errors"][3] == "500 no"
    assert {len(entries) for entries in found.values()} == {4}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"metrics": ["ttfb"]}, "percentile_metrics: 'ttfb' is none of ttft, tpot"),
        ({"percentiles": [101]}, "metric_percentiles: 101 must be from 0 to 100"),
        ({"objectives": {"itl": 1}}, "goodput: 'itl' is none of ttft, tpot, e2el"),
        ({"objectives": {"ttft": -1}}, "ttft:-1 must be at least 0 ms"),
        ({"price_per_device_hour": -2}, "must be at least 0"),
        ({"num_devices": 0}, "num_devices=0 must be at least 1"),
    ],
)
def test_numbers_that_cannot_be_told_are_refused(
    settings: dict[str, object], complaint: str
) -> None:
    with pytest.raises(RequestError, match=complaint):
        Wanted(**settings)  # type: ignore[arg-type]
