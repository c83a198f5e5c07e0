"""A workload run several times over, each time for another question, and what was measured of it.

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
from datetime import UTC, datetime
from pathlib import Path

from bireme.bench.latency import spread
from bireme.bench.rank_memory import memory_of_ranks
from bireme.bench.run_facts import (
    layout_of,
    run_hardware,
    run_layout,
    run_model,
    run_settings,
    run_workload,
)
from bireme.bench.step_log import StepLog, logged
from bireme.bench.throughput import ThroughputResult, measure_throughput
from bireme.bench.workload import Workload
from bireme.chrome_trace import Recorded
from bireme.config import DTYPE_BYTES
from bireme.engine.llm import LLM
from bireme.engine.messages import Profiled, RankUsage
from bireme.observe.ceilings import Ceilings, ceilings_of
from bireme.observe.exchanges import collective_sizes, message_sizes
from bireme.observe.ledger import make_ledger
from bireme.observe.profile_records import (
    Latency,
    LayerTime,
    Operator,
    Profile,
    RequestTimes,
    Throughput,
)
from bireme.observe.rates import rank_rates
from bireme.observe.run_folder import RunFolder, kernel_trace_path, write_run_folder
from bireme.observe.run_records import RunAbout, RunLedger
from bireme.outputs import Delta, RequestOutput, TokenGaps
from bireme.parallel.operations import rank_operations
from bireme.planning.probe import hardware
from bireme.planning.probe.probe import versions_of
from bireme.trace import SpanKind

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
class _Measured:
    """The measured pass."""

    result: ThroughputResult
    latency: Latency
    log: StepLog
    recorded: Recorded
    is_whole: bool
    usage: tuple[list[RankUsage], list[RankUsage]]  # before it and behind


@dataclass(frozen=True)
class _Looked:
    """The passes after it."""

    layers: list[Profiled]
    usage: list[RankUsage]
    operators: list[Profiled]


def check_workload(llm: LLM, workload: Workload) -> None:
    """RequestError for what the model cannot take, before any process starts."""
    prompts, params = workload.make(llm.model.config.vocab_size)
    llm.inputs.open(0, prompts[0], params[0])


def profile(llm: LLM, plan: ProfilePlan, done: Callable[[], None] = lambda: None) -> RunFolder:
    """Into `plan.folder`, which was prepared. `done` is called after every pass."""
    start_s, date, load = time.monotonic(), datetime.now(UTC), hardware.load_average()
    layout = layout_of(llm.plan)
    told_layout, settings = run_layout(llm.plan, layout), run_settings(llm.plan)
    machine = run_hardware(llm.plan, load)
    ceilings = None
    if plan.cluster is not None:
        ceilings = ceilings_of(plan.cluster, told_layout, settings, machine.host)
    llm.start()
    passes = _Passes(llm, plan, done)
    passes.warm_up()
    measured = passes.measure()
    looked = passes.look()
    ledger = make_ledger(measured.recorded)
    item_bytes = DTYPE_BYTES[llm.plan.dtype]
    operations = [
        rank_operations(llm.plan.model, layout, rank, item_bytes) for rank in layout.ranks
    ]
    found = Profile(
        seconds=(ledger.end_ns - ledger.start_ns) / 1e9,
        num_steps=sum(span.kind is SpanKind.SUBMIT for span in measured.recorded.engine),
        is_whole=measured.is_whole,
        throughput=_throughput(measured.result),
        latency=measured.latency,
        collectives=collective_sizes(measured.recorded, ceilings),
        messages=message_sizes(measured.recorded, ceilings),
        layers=_layers(looked.layers, told_layout.stages),
        memory=memory_of_ranks(llm, measured.usage, looked.usage),
        rates=rank_rates(ledger, measured.log.batches, operations, llm.plan.dtype, ceilings),
        steps=measured.log.samples(measured.recorded.start_ns),
        operators=_operators(looked.operators),
        cluster=ceilings.used if ceilings else None,
        notes=_notes(measured, ceilings),
    )
    about = RunAbout(
        command=list(plan.command),
        date=date.replace(microsecond=0),
        elapsed_s=time.monotonic() - start_s,
        versions=versions_of(llm.plan.devices),
        hardware=machine,
        model=run_model(llm, layout),
        layout=told_layout,
        workload=run_workload(plan.workload, plan.num_warmup),
        settings=settings,
    )
    return write_run_folder(plan.folder, about, measured.recorded, RunLedger.of(ledger), found)


class _Passes:
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

    def measure(self) -> _Measured:
        llm, latencies = self._llm, _Latencies()
        before = llm.executor.usage()
        start_ns = time.monotonic_ns()
        with logged(llm.start()) as log:
            result = measure_throughput(llm, self._workload, seen=latencies.note)
        after = llm.executor.usage()  # all spans are written by then
        recorded, is_whole = _since(llm.recorded(), start_ns)
        self._done()
        return _Measured(result, latencies.told(), log, recorded, is_whole, (before, after))

    def look(self) -> _Looked:
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
        return _Looked(layers, usage, operators)

    def _trace_kernels(self) -> list[Profiled]:
        executor = self._llm.executor
        path = kernel_trace_path(self._plan.folder.absolute(), "{rank}")
        path.parent.mkdir(exist_ok=True)
        other = self._other()
        short = dataclasses.replace(other, output_len=min(other.output_len, KERNEL_TOKENS))
        executor.begin_profile(path)
        measure_throughput(self._llm, short)
        return executor.end_profile()


def _since(recorded: Recorded, start_ns: int) -> tuple[Recorded, bool]:
    """What was recorded from then on, or from when on all rings tell of; whether that is all."""
    found = recorded.since(start_ns)
    num_told = sum(span.kind is SpanKind.SUBMIT for span in found.engine)
    num_done = [sum(it.kind is SpanKind.STEP for it in rank.spans) for rank in found.ranks]
    if all(count == num_told for count in num_done):
        return found, True
    tracks = [found.engine, *(rank.spans for rank in found.ranks)]
    known_ns = max(min((span.start_ns for span in spans), default=start_ns) for spans in tracks)
    return found.since(known_ns), False


def _throughput(result: ThroughputResult) -> Throughput:
    return Throughput(
        elapsed_s=result.elapsed_s,
        num_requests=result.workload.num_prompts,
        num_input_tokens=result.num_input_tokens,
        num_output_tokens=result.num_output_tokens,
        requests_per_s=result.requests_per_s,
        total_tokens_per_s=result.total_tokens_per_s,
        output_tokens_per_s=result.output_tokens_per_s,
        num_preemptions=result.num_preemptions,
    )


def _layers(found: Sequence[Profiled], stages: Sequence[int]) -> list[LayerTime]:
    return [
        LayerTime(
            rank=rank,
            stage=stages[rank],
            layer=seen.name,
            phase="decode" if seen.is_decode else "prefill",
            count=seen.count,
            time_s=seen.total_s,
            median_s=seen.median_s,
        )
        for rank, profiled in enumerate(found)
        for seen in profiled.layers
    ]


def _operators(found: Sequence[Profiled]) -> list[Operator]:
    return [
        Operator(rank=rank, name=one.name, count=one.count, self_s=one.self_s, time_s=one.total_s)
        for rank, profiled in enumerate(found)
        for one in profiled.operators
    ]


def _notes(measured: _Measured, ceilings: Ceilings | None) -> list[str]:
    notes = [] if ceilings is None else list(ceilings.notes)
    if ceilings is None:
        notes.append("no ceilings: give --cluster a cluster.toml, which `bireme probe` writes")
    elif ceilings.used.is_quick:
        notes.append("ceilings are of a probe with --quick, whose sizes caches hold")
    if not measured.is_whole:
        notes.append(
            "the ranks' rings held the end of the measured pass alone: trace, ledger and rates are of "
            "that; use fewer tokens"
        )
    return notes
