"""How long a batch of requests takes that begins and ends together."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bireme.bench.workload import Workload
from bireme.engine.llm import LLM
from bireme.errors import RequestError

PERCENTILES = (50, 90, 99)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles; nothing of nothing."""
    if not values:
        return {}
    found = np.percentile(values, PERCENTILES)
    named = {f"p{share}": float(value) for share, value in zip(PERCENTILES, found, strict=True)}
    return {"mean": float(np.mean(values)), **named}


@dataclass(frozen=True)
class Iteration:
    """Seconds: to the last token, and to the last of the first tokens."""

    total_s: float
    first_s: float


@dataclass(frozen=True)
class LatencyResult:
    """Iterations of one workload, and the weights of all ranks in bytes."""

    workload: Workload
    iterations: list[Iteration]
    weight_bytes: int

    @property
    def step_s(self) -> float:
        """The median time between two tokens of a request; 0 where each has but one."""
        steps = self.workload.output_len - 1
        if not steps:
            return 0.0
        return float(np.median([(it.total_s - it.first_s) / steps for it in self.iterations]))

    @property
    def output_tokens_per_s(self) -> float:
        tokens = self.workload.num_prompts * self.workload.output_len
        return tokens / float(np.median([it.total_s for it in self.iterations]))

    @property
    def weight_bytes_per_s(self) -> float:
        """What decoding reads of the weights, on all ranks together."""
        return self.weight_bytes / self.step_s if self.step_s else 0.0

    def percentiles(self, pick: Callable[[Iteration], float]) -> dict[str, float]:
        return spread([pick(iteration) for iteration in self.iterations])

    def as_json(self) -> dict[str, Any]:
        """Seconds; `avg_latency`, `latencies` and `percentiles` as `vllm bench latency`."""
        latencies = [iteration.total_s for iteration in self.iterations]
        percentiles = (10, 25, 50, 75, 90, 99)
        found = np.percentile(latencies, percentiles).tolist()
        return {
            **dataclasses.asdict(self.workload),
            "avg_latency": float(np.mean(latencies)),
            "latencies": latencies,
            "percentiles": dict(zip(map(str, percentiles), found, strict=True)),
            "ttft_s": self.percentiles(lambda it: it.first_s),
            "step_s": self.step_s,
            "output_tokens_per_s": self.output_tokens_per_s,
            "weight_bytes": self.weight_bytes,
            "weight_bytes_per_s": self.weight_bytes_per_s,
        }


def measure_latency(
    llm: LLM,
    workload: Workload,
    *,
    num_warmup: int,
    num_iterations: int,
    done: Callable[[], None] = lambda: None,
) -> LatencyResult:
    """`done` is called after each iteration, warm-up included. No iteration repeats a prompt. RequestError where
    not all of the batch can begin together."""
    most = llm.config.max_num_seqs
    if workload.num_prompts > most:
        raise RequestError(
            f"a batch of {workload.num_prompts} does not begin together: at most {most} requests run at "
            "once (max_num_seqs); lower the one or raise the other"
        )
    iterations = []
    for index in range(num_warmup + num_iterations):
        fresh = dataclasses.replace(workload, seed=workload.seed + index)
        iterations.append(_run(llm, fresh))
        done()
    weights = sum(rank.weight_bytes for rank in llm.loaded)
    return LatencyResult(workload, iterations[num_warmup:], weights)


def _run(llm: LLM, workload: Workload) -> Iteration:
    prompts, params = workload.make(llm.model.config.vocab_size)
    without_token, first = set(range(len(prompts))), 0.0
    start = time.perf_counter()
    for delta in llm.stream(prompts, params):
        if without_token:
            without_token.discard(delta.index)
            first = time.perf_counter() - start
    return Iteration(time.perf_counter() - start, first)
