"""Numbers of a load run, from what was seen of each request. Keys and meanings as `vllm bench serve`.

TTFT is the time to the first piece of an answer, TPOT = (e2e - TTFT) / (n - 1), ITL the gaps between
pieces, E2EL the time to the last one. Goodput counts the requests that met every objective
(DistServe, https://arxiv.org/abs/2401.09670). Of failed requests only their number counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from bireme.bench.answer import Answer, Sent
from bireme.bench.load import LoadResult
from bireme.errors import RequestError

METRICS = ("ttft", "tpot", "itl", "e2el", "client_queue_time")
OBJECTIVES = ("ttft", "tpot", "e2el")

Times = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked of the numbers: `objectives` in milliseconds a request, a price in any currency."""

    metrics: Sequence[str] = METRICS[:4]
    percentiles: Sequence[float] = (90, 99)
    objectives: Mapping[str, float] = field(default_factory=dict)
    price_per_device_hour: float | None = None
    num_devices: int = 1

    def __post_init__(self) -> None:
        for metric in self.metrics:
            if metric not in METRICS:
                raise RequestError(
                    f"percentile_metrics: {metric!r} is none of {', '.join(METRICS)}"
                )
        for share in self.percentiles:
            if not 0 <= share <= 100:
                raise RequestError(f"metric_percentiles: {share:g} must be from 0 to 100")
        for name, limit_ms in self.objectives.items():
            if name not in OBJECTIVES:
                raise RequestError(f"goodput: {name!r} is none of {', '.join(OBJECTIVES)}")
            if not limit_ms >= 0:
                raise RequestError(f"goodput: {name}:{limit_ms:g} must be at least 0 ms")
        if self.price_per_device_hour is not None and not self.price_per_device_hour >= 0:
            raise RequestError(
                f"price_per_device_hour={self.price_per_device_hour} must be at least 0"
            )
        if self.num_devices < 1:
            raise RequestError(f"num_devices={self.num_devices} must be at least 1")


def summarise(result: LoadResult, wanted: Wanted) -> dict[str, Any]:
    """One number a key; None where there was nothing to measure."""
    good = [one for one in result.sent if not one.answer.error]
    num_input = sum(one.answer.num_input_tokens for one in good)
    num_output = sum(one.answer.num_output_tokens for one in good)
    seconds = result.duration_s
    met = sum(_meets(one.answer, wanted.objectives) for one in good)
    return {
        "duration": seconds,
        "completed": len(good),
        "failed": len(result.sent) - len(good),
        "unfinished": result.num_unfinished,
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(good) / seconds,
        "request_goodput": met / seconds if wanted.objectives else None,
        "output_throughput": num_output / seconds,
        "total_token_throughput": (num_input + num_output) / seconds,
        "max_output_tokens_per_s": max(_peak_tokens_per_s(good), num_output / seconds),
        "max_concurrent_requests": _peak_concurrency(good),
        **_times(good, wanted),
        **_costs(wanted, seconds, len(good), num_input, num_output),
        **_lags(result.sent),
        "generator_cpu_share": result.cpu_share,
    }


def per_request(result: LoadResult) -> dict[str, list[Any]]:
    """Lists, an entry a request in the order of sending; seconds."""
    sent = sorted(result.sent, key=lambda one: one.index)
    answers = [one.answer for one in sent]
    return {
        "input_lens": [answer.num_input_tokens for answer in answers],
        "output_lens": [0 if each.error else each.num_output_tokens for each in answers],
        "ttfts": [answer.ttft_s for answer in answers],
        "itls": [answer.itls.tolist() for answer in answers],
        "latencies": [answer.latency_s for answer in answers],
        "start_times": [one.sent_s for one in sent],
        "queue_times": [one.queue_s for one in sent],
        "generated_texts": [answer.text for answer in answers],
        "errors": [answer.error for answer in answers],
    }


def _meets(answer: Answer, objectives: Mapping[str, float]) -> bool:
    """An answer of one token has no TPOT, and misses no objective for it."""
    seen = {"ttft": answer.ttft_s, "tpot": answer.tpot_s or 0.0, "e2el": answer.latency_s}
    return all(seen[name] * 1000 <= limit_ms for name, limit_ms in objectives.items())


def _times(good: list[Sent], wanted: Wanted) -> dict[str, float | None]:
    seen = {
        "ttft": _array(one.answer.ttft_s for one in good),
        "tpot": _array(each for one in good if (each := one.answer.tpot_s) is not None),
        "itl": np.concatenate([np.asarray(one.answer.itls) for one in good] or [np.empty(0)]),
        "e2el": _array(one.answer.latency_s for one in good),
        "client_queue_time": _array(one.queue_s for one in good),
    }
    found: dict[str, float | None] = {}
    for metric in wanted.metrics:
        found |= _spread(metric, seen[metric] * 1000, wanted.percentiles)
    return found


def _spread(metric: str, times: Times, percentiles: Sequence[float]) -> dict[str, float | None]:
    """Mean, median, standard deviation and percentiles, under vLLM's keys."""
    keys = [f"{name}_{metric}_ms" for name in ("mean", "median", "std")]
    keys += [f"p{share:g}_{metric}_ms" for share in percentiles]
    if not len(times):
        return dict.fromkeys(keys)
    found = [times.mean(), np.median(times), times.std(), *np.percentile(times, percentiles)]
    return {key: float(value) for key, value in zip(keys, found, strict=True)}


def _costs(
    wanted: Wanted, seconds: float, num_requests: int, num_input: int, num_output: int
) -> dict[str, float | None]:
    """In the currency of the price; of all devices for as long as the run took."""
    if wanted.price_per_device_hour is None:
        return {}
    cost = wanted.price_per_device_hour * wanted.num_devices * seconds / 3600
    shares = {
        "cost_per_1000_queries": num_requests / 1e3,
        "cost_per_million_tokens": (num_input + num_output) / 1e6,
        "cost_per_million_output_tokens": num_output / 1e6,
    }
    return {key: cost / count if count else None for key, count in shares.items()}


def _lags(sent: list[Sent]) -> dict[str, float | None]:
    """How much later than it was due the generator came to send a request."""
    lags = _array(one.lag_s for one in sent) * 1000
    if not len(lags):
        return dict.fromkeys(("mean_lag_ms", "p99_lag_ms", "max_lag_ms"))
    return {
        "mean_lag_ms": float(lags.mean()),
        "p99_lag_ms": float(np.percentile(lags, 99)),
        "max_lag_ms": float(lags.max()),
    }


def _peak_tokens_per_s(good: list[Sent]) -> float:
    """Of the best whole second after the first request; an answer's tokens are spread evenly over its
    pieces."""
    counts: dict[int, float] = {}
    for one in good:
        answer = one.answer
        times = one.sent_s + answer.ttft_s + np.cumsum([0.0, *answer.itls])
        seconds, pieces = np.unique(times.astype(np.int64), return_counts=True)
        for second, count in zip(seconds.tolist(), pieces.tolist(), strict=True):
            tokens = count * answer.num_output_tokens / len(times)
            counts[second] = counts.get(second, 0.0) + tokens
    return max(counts.values(), default=0.0)


def _peak_concurrency(good: list[Sent]) -> int:
    """Requests on their way at once; one that ends when another begins is not beside it."""
    changes = [(one.sent_s, 1) for one in good]
    changes += [(one.sent_s + one.answer.latency_s, -1) for one in good]
    steps = [step for _, step in sorted(changes)]
    return int(np.cumsum(steps).max()) if steps else 0


def _array(times: Iterable[float]) -> Times:
    return np.fromiter(times, dtype=np.float64)
