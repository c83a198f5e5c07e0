"""A profile: the passes of a workload, and from them all that a run folder tells."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from bireme.bench.memory_kinds import memory_of_ranks
from bireme.bench.passes import Looked, Measured, Passes, ProfilePlan
from bireme.bench.run_facts import (
    layout_of,
    run_hardware,
    run_layout,
    run_model,
    run_settings,
    run_workload,
)
from bireme.bench.throughput import ThroughputResult
from bireme.config import DTYPE_BYTES
from bireme.engine.llm import LLM
from bireme.engine.messages import Profiled
from bireme.observe.ceilings import Ceilings, ceilings_of
from bireme.observe.exchanges import collective_sizes, message_sizes
from bireme.observe.ledger import Ledger, make_ledger
from bireme.observe.profile_records import (
    LayerTime,
    Operator,
    Profile,
    Throughput,
)
from bireme.observe.rates import rank_rates
from bireme.observe.run_folder import RunFolder, write_run_folder
from bireme.observe.run_records import RunAbout, RunLedger
from bireme.parallel.layout import ModelLayout
from bireme.parallel.operations import rank_operations
from bireme.planning.probe import hardware
from bireme.planning.probe.probe import versions_of


def profile(llm: LLM, plan: ProfilePlan, done: Callable[[], None] = lambda: None) -> RunFolder:
    """Into `plan.folder`, which was prepared. `done` is called after every pass."""
    start_s, date, load = time.monotonic(), datetime.now(UTC), hardware.load_average()
    layout = layout_of(llm.plan)
    told_layout, settings = run_layout(llm.plan, layout), run_settings(llm.plan)
    machine = run_hardware(llm.plan.devices, load)
    ceilings = None
    if plan.cluster is not None:
        ceilings = ceilings_of(plan.cluster, told_layout, settings, machine.host)
    passes = Passes(llm, plan, done)
    passes.warm_up()
    measured, looked = passes.measure(), passes.look()
    ledger = make_ledger(measured.recorded)
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
    found = _profile(llm, layout, measured, looked, ledger, ceilings)
    return write_run_folder(plan.folder, about, measured.recorded, RunLedger.of(ledger), found)


def _profile(
    llm: LLM,
    layout: ModelLayout,
    measured: Measured,
    looked: Looked,
    ledger: Ledger,
    ceilings: Ceilings | None,
) -> Profile:
    recorded, dtype = measured.recorded, llm.plan.dtype
    operations = [
        rank_operations(llm.plan.model, layout, rank, DTYPE_BYTES[dtype]) for rank in layout.ranks
    ]
    return Profile(
        seconds=(ledger.end_ns - ledger.start_ns) / 1e9,
        num_steps=measured.log.num_steps,
        is_whole=measured.is_whole,
        throughput=_throughput(measured.result),
        latency=measured.latency,
        collectives=collective_sizes(recorded, ceilings),
        messages=message_sizes(recorded, ceilings),
        layers=_layers(looked.layers, [rank.stage for rank in layout.ranks]),
        memory=memory_of_ranks(llm, measured.usage, looked.usage),
        rates=rank_rates(ledger, measured.log.batches, operations, dtype, ceilings),
        steps=measured.log.samples(recorded.start_ns),
        operators=_operators(looked.operators),
        batches=looked.batches,
        chunks=looked.chunks,
        clocks=looked.clocks.of_ranks(llm.plan.devices),
        cluster=ceilings.used if ceilings else None,
        notes=_notes(measured, ceilings),
    )


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


def _notes(measured: Measured, ceilings: Ceilings | None) -> list[str]:
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
