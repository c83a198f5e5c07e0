"""Metrics of a server: vLLM's names, what a request's deltas say, and what the engine counts."""

from __future__ import annotations

import pytest
from exposed import STATS, delta, finished, names, shown, used, value

from bireme.outputs import CompletionOutput, RequestMetrics, RequestOutput
from bireme.server.finished import FinishedRequest
from bireme.server.metrics import FINISHED_REASONS, ServerMetrics

OF_VLLM = """
num_requests_running num_requests_waiting kv_cache_usage_perc num_preemptions_total
prefix_cache_queries_total prefix_cache_hits_total prompt_tokens_total generation_tokens_total
request_success_total time_to_first_token_seconds_bucket inter_token_latency_seconds_bucket
e2e_request_latency_seconds_bucket request_queue_time_seconds_bucket request_prompt_tokens_bucket
request_generation_tokens_bucket
""".split()


def test_names_are_those_of_vllm_under_our_prefix_and_under_an_alias() -> None:
    plain, aliased = names(shown(used())), names(shown(used("vllm")))
    assert {f"bireme:{name}" for name in OF_VLLM} <= plain
    assert not any(name.startswith("vllm:") for name in plain)
    ours = {name for name in plain if name.startswith("bireme:")}
    assert aliased == plain | {name.replace("bireme:", "vllm:") for name in ours}


def test_an_alias_has_the_same_values() -> None:
    samples = shown(used("vllm"))
    ours = {key: number for key, number in samples.items() if key[0].startswith("bireme:")}
    assert len(ours) > 100
    for (name, labels), number in ours.items():
        assert samples[name.replace("bireme:", "vllm:"), labels] == number


def test_every_sample_is_labelled_with_its_model_and_engine() -> None:
    body, content_type = used().render(STATS)
    ours = [line for line in body.decode().splitlines() if line.startswith("bireme:")]
    assert all('model_name="demo"' in line and 'engine="0"' in line for line in ours)
    assert content_type.startswith("text/plain; version=0.0.4")


def test_time_to_the_first_token_and_gaps_within_a_choice() -> None:
    samples = shown(used())
    first, gap = "bireme:time_to_first_token_seconds", "bireme:inter_token_latency_seconds"
    assert (value(samples, f"{first}_count"), value(samples, f"{first}_sum")) == (1, 1.0)
    assert (value(samples, f"{gap}_count"), value(samples, f"{gap}_sum")) == (1, 0.75)
    assert value(samples, f"{gap}_bucket", le="0.5") == 0
    assert value(samples, f"{gap}_bucket", le="0.75") == 1
    assert value(samples, "bireme:prompt_tokens_total") == 7
    assert value(samples, "bireme:generation_tokens_total") == 4


def test_a_request_without_a_token_has_no_first_one() -> None:
    metrics = ServerMetrics("demo")
    metrics.begin(7, 0.0).note_tokens(delta(1.0, num_tokens=0))
    samples = shown(metrics)
    assert value(samples, "bireme:time_to_first_token_seconds_count") == 0
    assert value(samples, "bireme:prompt_tokens_total") == 0


def test_requests_that_ended_are_counted_by_their_reason() -> None:
    samples = shown(used())
    counts = {
        reason: value(samples, "bireme:request_success_total", finished_reason=reason)
        for reason in FINISHED_REASONS
    }
    assert counts == {"stop": 1, "length": 0, "abort": 1, "timeout": 0, "error": 0}
    assert value(samples, "bireme:e2e_request_latency_seconds_sum") == 6
    assert value(samples, "bireme:request_queue_time_seconds_sum") == 1
    assert value(samples, "bireme:request_generation_tokens_sum") == 8
    labels = {"method": "POST", "handler": "/v1/completions", "status": "200"}
    assert value(samples, "bireme:http_requests_total", **labels) == 1


def test_a_reason_that_nobody_knows_is_an_error() -> None:
    metrics = ServerMetrics("demo")
    metrics.note_finished(finished("melted"))
    assert value(shown(metrics), "bireme:request_success_total", finished_reason="error") == 1


def test_what_the_engine_counts_is_shown_as_it_was_told() -> None:
    samples = shown(used())
    assert value(samples, "bireme:engine_ready") == 1
    assert value(samples, "bireme:num_requests_running") == 3
    assert value(samples, "bireme:num_requests_waiting") == 2
    assert value(samples, "bireme:kv_cache_usage_perc") == 0.5
    assert value(samples, "bireme:num_preemptions_total") == 1
    assert value(samples, "bireme:prefix_cache_queries_total") == 64
    assert value(samples, "bireme:prefix_cache_hits_total") == 16


@pytest.mark.parametrize("where", [("0", "0"), ("1", "1")])
def test_each_rank_shows_its_time_its_bytes_and_its_memory(where: tuple[str, str]) -> None:
    samples, labels = shown(used()), dict(zip(("stage", "rank"), where, strict=True))
    kinds = {"busy": 1.5, "idle": 4.0, "collective": 0.5, "overhead": 0.0625}
    for kind, seconds in kinds.items():
        assert value(samples, f"bireme:rank_{kind}_seconds_total", **labels) == seconds
    for direction, seconds, size in (("send", 0.25, 200), ("receive", 0.125, 300)):
        own = {**labels, "direction": direction}
        assert value(samples, "bireme:rank_transfer_seconds_total", **own) == seconds
        assert value(samples, "bireme:rank_transferred_bytes_total", **own) == size
    assert value(samples, "bireme:rank_collective_bytes_total", **labels) == 100
    assert value(samples, "bireme:rank_steps_total", **labels) == 9
    for kind, size in (("weights", 1000), ("cache", 2000), ("steps", 3000)):
        assert value(samples, "bireme:rank_memory_bytes", **labels, kind=kind) == size


def test_an_engine_that_is_not_ready_says_only_that() -> None:
    samples = shown(used(), None)
    assert value(samples, "bireme:engine_ready") == 0
    assert value(samples, "bireme:generation_tokens_total") == 4
    assert not any("rank" in name or "num_requests" in name for name in names(samples))


def test_every_metric_says_what_it_is_and_none_when_it_was_made() -> None:
    text = used("vllm").render(STATS)[0].decode()
    told = {line.split(" ", 3)[2]: line for line in text.splitlines() if line.startswith("# HELP")}
    assert all(len(line.split(" ", 3)[3]) > 10 for line in told.values())
    assert "_created" not in text


def test_two_servers_of_a_process_count_apart() -> None:
    used()
    assert value(shown(ServerMetrics("other")), "bireme:generation_tokens_total") == 0


def test_a_finished_request_is_read_from_its_output() -> None:
    def output(num_tokens: int) -> RequestOutput:
        return RequestOutput(
            request_id="a", prompt=None, prompt_token_ids=[1, 2], finished=True, num_cached_tokens=1,
            outputs=[CompletionOutput(index=0, text="", token_ids=[], finish_reason="length")],
            metrics=RequestMetrics(ttft_s=2.0, e2e_s=5.0, num_tokens=num_tokens, queue_s=1.0),
        )  # fmt: skip

    whole = FinishedRequest.of(output(3))
    assert (whole.finished_reason, whole.ttft_s, whole.queue_s) == ("length", 2.0, 1.0)
    assert (whole.num_prompt_tokens, whole.num_cached_tokens) == (2, 1)
    assert whole.error is None
    cut = FinishedRequest.of(output(0), "abort")
    assert (cut.finished_reason, cut.ttft_s) == ("abort", None)
