"""A workload run several times over, each time for another question.

1. warm-up, in no figure;
2. the measured pass: spans, steps, latencies, throughput, with nothing in its way;
3. the same with hooks around layers, and with memory's peak looked at;
4. if asked for, a short one under torch.profiler.

No pass repeats another's prompts, so that no cache answers for it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bireme.bench.latency import spread
from bireme.bench.step_log import StepLog, logged
from bireme.bench.throughput import ThroughputResult, measure_throughput
from bireme.bench.workload import Workload
from bireme.chrome_trace import Recorded
from bireme.engine.llm import LLM
from bireme.engine.messages import Profiled, RankUsage
from bireme.observe.profile_records import Latency, RequestTimes
from bireme.observe.run_folder import kernel_trace_path
from bireme.observe.window import whole_since
from bireme.outputs import Delta, RequestOutput, TokenGaps

KERNEL_TOKENS = 8  # of an answer in the pass under torch.profiler, whose traces grow by the step


@dataclass(frozen=True, kw_only=True)
class ProfilePlan:
    """What to run, and where to write it; `command` is told in the folder."""

    workload: Workload
    num_warmup: int
    has_kernels: bool
    cluster: Path | None
    folder: Path
    command: Sequence[str]

    @property
    def num_passes(self) -> int:
        return self.num_warmup + 2 + self.has_kernels


class _Latencies:
    """What deltas say of time, as a server counts it."""

    def __init__(self) -> None:
        self._gaps = TokenGaps()
        self.gaps_s: list[float] = []
        self.outputs: list[RequestOutput] = []

    def note(self, delta: Delta) -> None:
        if (gap_s := self._gaps.note(delta)) is not None:
            self.gaps_s.append(gap_s)
        if delta.output is not None:
            self.outputs.append(delta.output)

    def told(self) -> Latency:
        requests = [_request_times(output) for output in self.outputs]
        return Latency(
            ttft_s=spread([one.ttft_s for one in requests]),
            itl_s=spread(self.gaps_s),
            e2e_s=spread([one.e2e_s for one in requests]),
            queue_s=spread([one.queue_s for one in requests]),
            requests=requests,
        )


def _request_times(output: RequestOutput) -> RequestTimes:
    metrics = output.metrics
    assert metrics is not None, "an engine's output has them"
    return RequestTimes(
        num_input_tokens=len(output.prompt_token_ids),
        num_output_tokens=metrics.num_tokens,
        queue_s=metrics.queue_s,
        ttft_s=metrics.ttft_s,
        e2e_s=metrics.e2e_s,
    )


@dataclass(frozen=True)
class Measured:
    """The measured pass."""

    result: ThroughputResult
    latency: Latency
    log: StepLog
    recorded: Recorded
    is_whole: bool
    usage: tuple[list[RankUsage], list[RankUsage]]  # before it and behind


@dataclass(frozen=True)
class Looked:
    """The passes after it."""

    layers: list[Profiled]
    usage: list[RankUsage]
    operators: list[Profiled]


def check_workload(llm: LLM, workload: Workload) -> None:
    """RequestError for what the model cannot take, before any process starts."""
    prompts, params = workload.make(llm.model.config.vocab_size)
    llm.inputs.open(0, prompts[0], params[0])


class Passes:
    """One after the other, of ranks that run."""

    def __init__(self, llm: LLM, plan: ProfilePlan, done: Callable[[], None]) -> None:
        self._llm, self._plan, self._done = llm, plan, done
        self._workload = plan.workload
        self._next_seed = plan.workload.seed + 1

    def _other(self) -> Workload:
        """The same with prompts of its own."""
        self._next_seed += 1
        return dataclasses.replace(self._workload, seed=self._next_seed)

    def warm_up(self) -> None:
        for _ in range(self._plan.num_warmup):
            measure_throughput(self._llm, self._other())
            self._done()

    def measure(self) -> Measured:
        llm, latencies = self._llm, _Latencies()
        before = llm.executor.usage()
        start_ns = time.monotonic_ns()
        with logged(llm.start()) as log:
            result = measure_throughput(llm, self._workload, seen=latencies.note)
        after = llm.executor.usage()  # all spans are written by then
        recorded, is_whole = whole_since(llm.recorded(), start_ns)
        self._done()
        return Measured(result, latencies.told(), log, recorded, is_whole, (before, after))

    def look(self) -> Looked:
        llm, executor = self._llm, self._llm.executor
        executor.begin_profile()
        measure_throughput(llm, self._other())
        layers = executor.end_profile()
        usage = executor.usage()
        self._done()
        operators: list[Profiled] = []
        if self._plan.has_kernels:
            operators = self._trace_kernels()
            self._done()
        return Looked(layers, usage, operators)

    def _trace_kernels(self) -> list[Profiled]:
        executor = self._llm.executor
        path = kernel_trace_path(self._plan.folder.absolute(), "{rank}")
        path.parent.mkdir(exist_ok=True)
        other = self._other()
        short = dataclasses.replace(other, output_len=min(other.output_len, KERNEL_TOKENS))
        executor.begin_profile(path)
        measure_throughput(self._llm, short)
        return executor.end_profile()
