"""A workload run several times over, each time for another question.

1. warm-up, in no figure;
2. the measured pass: spans, steps, latencies, throughput, with nothing in its way;
3. the same with hooks around layers, and with memory's peak and the GPUs' clocks looked at;
4. if asked for, a short one under torch.profiler;
5. if asked for, one of each other size of the batch, and of what a step may hold.

No pass repeats another's prompts, so that no cache answers for it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bireme.bench.answer_times import Latencies
from bireme.bench.clocks import Clocks, watched_clocks
from bireme.bench.size_passes import pass_of_batch, pass_of_chunk
from bireme.bench.step_log import StepLog, logged
from bireme.bench.throughput import ThroughputResult, measure_throughput
from bireme.bench.workload import Workload
from bireme.chrome_trace import Recorded
from bireme.engine.llm import LLM
from bireme.engine.messages import Profiled, RankUsage
from bireme.observe.profile_records import Latency, SizePass
from bireme.observe.run_folder import kernel_trace_path
from bireme.observe.window import whole_since

KERNEL_TOKENS = 8  # of an answer in the pass under torch.profiler, whose traces grow by the step


@dataclass(frozen=True, kw_only=True)
class ProfilePlan:
    """What to run, and where to write it; `command` is told in the folder. `batches` and `chunks` are other
    sizes to run it with."""

    workload: Workload
    num_warmup: int
    has_kernels: bool
    cluster: Path | None
    folder: Path
    command: Sequence[str]
    batches: Sequence[int] = ()
    chunks: Sequence[int] = ()

    @property
    def num_passes(self) -> int:
        return self.num_warmup + 2 + self.has_kernels + len(self.batches) + len(self.chunks)


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
    clocks: Clocks
    batches: list[SizePass]
    chunks: list[SizePass]


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
        llm, latencies = self._llm, Latencies()
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
        with watched_clocks(llm.plan.devices) as clocks:
            measure_throughput(llm, self._other())
        layers = executor.end_profile()
        usage = executor.usage()
        self._done()
        operators: list[Profiled] = []
        if self._plan.has_kernels:
            operators = self._trace_kernels()
            self._done()
        plan = self._plan
        batches = [self._sized(pass_of_batch, size) for size in plan.batches]
        chunks = [self._sized(pass_of_chunk, size) for size in plan.chunks]
        return Looked(layers, usage, operators, clocks, batches, chunks)

    def _sized(self, of_size: Callable[[LLM, Workload, int], SizePass], size: int) -> SizePass:
        found = of_size(self._llm, self._other(), size)
        self._done()
        return found

    def _trace_kernels(self) -> list[Profiled]:
        executor = self._llm.executor
        path = kernel_trace_path(self._plan.folder.absolute(), "{rank}")
        path.parent.mkdir(exist_ok=True)
        other = self._other()
        short = dataclasses.replace(other, output_len=min(other.output_len, KERNEL_TOKENS))
        executor.begin_profile(path)
        measure_throughput(self._llm, short)
        return executor.end_profile()
