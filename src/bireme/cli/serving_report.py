"""The text block of `bench serve`, laid out as that of `vllm bench serve`, and a few lines more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bireme.bench.serving_metrics import Wanted

_WIDTH = 50
_NAMES = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
    "client_queue_time": ("Client Queue Time", "Client-side Queueing"),
}

Numbers = Mapping[str, float | None]


def print_block(
    numbers: Numbers, wanted: Wanted, max_concurrency: int | None, request_rate: float | None
) -> None:
    print(f"{' Serving Benchmark Result ':=^{_WIDTH}}")
    asked: dict[str, float | None] = {"Maximum request concurrency:": max_concurrency}
    if request_rate is not None and request_rate != float("inf"):
        asked["Request rate configured (RPS):"] = request_rate
    for name, number in [*_counts(numbers, asked), *_rates(numbers)]:
        _line(name, number)
    for metric in wanted.metrics:
        _print_metric(metric, numbers, wanted)
    if wanted.price_per_device_hour is not None:
        print(f"{'Cost':-^{_WIDTH}}")
        _line("Per 1,000 queries:", numbers["cost_per_1000_queries"], digits=6)
        _line("Per million tokens:", numbers["cost_per_million_tokens"], digits=6)
        _line("Per million output tokens:", numbers["cost_per_million_output_tokens"], digits=6)
    print(f"{'Load Generator':-^{_WIDTH}}")
    share = numbers["generator_cpu_share"]
    _line("CPU (% of a core):", share and share * 100)
    for which in ("mean", "p99", "max"):
        _line(f"{which.capitalize()} lag of sending (ms):", numbers[f"{which}_lag_ms"])
    print("=" * _WIDTH)


def _counts(numbers: Numbers, asked: Numbers) -> Iterator[tuple[str, float | None]]:
    yield "Successful requests:", numbers["completed"]
    yield "Failed requests:", numbers["failed"]
    if numbers["unfinished"]:
        yield "Unfinished requests:", numbers["unfinished"]
    yield from ((name, number) for name, number in asked.items() if number is not None)
    yield "Benchmark duration (s):", numbers["duration"]
    yield "Total input tokens:", numbers["total_input_tokens"]
    yield "Total generated tokens:", numbers["total_output_tokens"]


def _rates(numbers: Numbers) -> Iterator[tuple[str, float | None]]:
    yield "Request throughput (req/s):", numbers["request_throughput"]
    if numbers["request_goodput"] is not None:
        yield "Request goodput (req/s):", numbers["request_goodput"]
    yield "Output token throughput (tok/s):", numbers["output_throughput"]
    yield "Peak output token throughput (tok/s):", numbers["max_output_tokens_per_s"]
    yield "Peak concurrent requests:", numbers["max_concurrent_requests"]
    yield "Total token throughput (tok/s):", numbers["total_token_throughput"]


def _print_metric(metric: str, numbers: Numbers, wanted: Wanted) -> None:
    short, title = _NAMES[metric]
    print(f"{title:-^{_WIDTH}}")
    _line(f"Mean {short} (ms):", numbers[f"mean_{metric}_ms"])
    _line(f"Median {short} (ms):", numbers[f"median_{metric}_ms"])
    for share in wanted.percentiles:
        _line(f"P{share:g} {short} (ms):", numbers[f"p{share:g}_{metric}_ms"])


def _line(name: str, number: float | None, digits: int = 2) -> None:
    """Counts as they are; a dash where there was nothing to measure."""
    shown = (
        "-" if number is None else f"{number:.{digits}f}" if isinstance(number, float) else number
    )
    print(f"{name:<40} {shown:<10}".rstrip())
