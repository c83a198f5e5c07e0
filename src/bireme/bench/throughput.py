"""How many requests and tokens a second go through when all requests are there from the start."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bireme.bench.workload import Workload
from bireme.engine.llm import LLM
from bireme.outputs import Delta


@dataclass(frozen=True)
class ThroughputResult:
    """One run of a workload from its first request to its last token."""

    workload: Workload
    elapsed_s: float
    num_input_tokens: int
    num_output_tokens: int
    num_preemptions: int

    @property
    def requests_per_s(self) -> float:
        return self.workload.num_prompts / self.elapsed_s

    @property
    def total_tokens_per_s(self) -> float:
        return (self.num_input_tokens + self.num_output_tokens) / self.elapsed_s

    @property
    def output_tokens_per_s(self) -> float:
        return self.num_output_tokens / self.elapsed_s

    def as_json(self) -> dict[str, Any]:
        """Keys as `vllm bench throughput`, and those of the workload."""
        return {
            **dataclasses.asdict(self.workload),
            "elapsed_time": self.elapsed_s,
            "num_requests": self.workload.num_prompts,
            "total_num_tokens": self.num_input_tokens + self.num_output_tokens,
            "num_output_tokens": self.num_output_tokens,
            "requests_per_second": self.requests_per_s,
            "tokens_per_second": self.total_tokens_per_s,
            "output_tokens_per_second": self.output_tokens_per_s,
            "num_preemptions": self.num_preemptions,
        }


def measure_throughput(
    llm: LLM,
    workload: Workload,
    *,
    progress: Callable[[int, int], None] = lambda *_: None,
    seen: Callable[[Delta], None] = lambda _: None,
) -> ThroughputResult:
    """`progress` gets the requests that ended and the tokens that came since its last call, `seen` all that
    came."""
    prompts, params = workload.make(llm.model.config.vocab_size)
    scheduler = llm.start().scheduler
    before, num_output = scheduler.num_preemptions, 0
    start = time.perf_counter()
    for delta in llm.stream(prompts, params):
        num_output += len(delta.token_ids)
        seen(delta)
        progress(delta.output is not None, len(delta.token_ids))
    return ThroughputResult(
        workload,
        time.perf_counter() - start,
        sum(map(len, prompts)),
        num_output,
        scheduler.num_preemptions - before,
    )
