"""What a report shows of a run: every figure is one of its run folder, computed by whoever computes it elsewhere."""

from __future__ import annotations

import shlex

import msgspec

from bireme.config import format_bytes
from bireme.doctor.finding import Finding
from bireme.doctor.from_run import evidence_of
from bireme.doctor.rules import examine
from bireme.observe.gantt import Gantt
from bireme.observe.ledger import make_ledger
from bireme.observe.pipeline_records import ImageThroughput
from bireme.observe.profile_records import (
    CollectiveSize,
    Latency,
    MessageSize,
    Profile,
    RankMemory,
    Spread,
)
from bireme.observe.run_folder import RunFolder
from bireme.observe.run_records import ImageWorkload, RequestWorkload, RunAbout, RunRank
from bireme.observe.told import ToldLedger
from bireme.report.pipelines import (
    PlanData,
    image_figures,
    image_workload,
    plan_data,
    trial_rows,
)
from bireme.report.sizes import SizeData, batches, chunks

MOST_BARS = 130_000  # of all ranks of all runs of a report: about 4 MB


class RankBytes(msgspec.Struct, frozen=True):
    """Bytes in one rank's memory by kind, and what is reserved for its cache; None without one."""

    name: str
    bytes: dict[str, int]
    reserved_cache: int | None


class RunData(msgspec.Struct, frozen=True, kw_only=True):
    """One run, as `report.js` draws it. `facts` and `figures` are (what, value) for people; `parts` is what
    stages are made of: layers, or blocks of a vision model. No latencies: it had no requests."""

    name: str
    title: str
    facts: list[tuple[str, str]]
    figures: list[tuple[str, str]]
    findings: list[Finding]
    latency_s: dict[str, dict[str, float]]
    parts: str
    ranks: list[RunRank]
    ledger: ToldLedger
    gantt: Gantt
    memory: list[RankBytes]
    collectives: list[CollectiveSize]
    messages: list[MessageSize]
    batches: list[SizeData]
    chunks: list[SizeData]
    notes: list[str]
    trials: list[list[str]]
    plan: PlanData | None


def run_data(run: RunFolder, most_bars: int = MOST_BARS) -> RunData:
    """UserError where the folder is damaged."""
    about, profile = run.about, run.profile
    ledger = make_ledger(run.recorded)
    names = about.layout.names
    return RunData(
        name=run.path.name,
        title=f"{about.model.name}: {layout_text(about)}, {about.model.dtype}",
        facts=_facts(about),
        figures=_figures(about, profile),
        findings=examine(evidence_of(run)),
        latency_s={} if profile.latency is None else _latencies(profile.latency),
        parts=_parts(about),
        ranks=about.layout.ranks,
        ledger=run.ledger.told,
        gantt=Gantt.of(ledger, most_bars),
        memory=[_bytes(*pair) for pair in zip(names, profile.memory, strict=True)],
        collectives=profile.collectives,
        messages=profile.messages,
        batches=batches(about, profile),
        chunks=chunks(about, profile),
        notes=profile.notes,
        trials=trial_rows(profile.trials),
        plan=_plan(run),
    )


def _plan(run: RunFolder) -> PlanData | None:
    measured = run.profile.throughput
    if run.plan is None or not isinstance(measured, ImageThroughput):
        return None
    return plan_data(run.plan, measured)


def _parts(about: RunAbout) -> str:
    return "blocks" if isinstance(about.workload, ImageWorkload) else "layers"


def _latencies(found: Latency) -> dict[str, Spread]:
    return {
        "to the first token": found.ttft_s,
        "between tokens": found.itl_s,
        "end to end": found.e2e_s,
        "in the queue": found.queue_s,
    }


def layout_text(about: RunAbout) -> str:
    widths = about.layout.widths
    if len(set(widths)) == 1:
        return f"tp {widths[0]} x pp {len(widths)}"
    return f"tp {','.join(map(str, widths))} (pp {len(widths)})"


def _facts(about: RunAbout) -> list[tuple[str, str]]:
    machine, work = about.hardware, about.workload
    return [
        ("command", shlex.join(about.command)),
        ("when", about.date.isoformat(sep=" ")),
        ("workload", _workload(work)),
        (f"{_parts(about)} a stage", ", ".join(map(str, about.layout.layers_per_stage))),
        (
            "host",
            f"{machine.host}: {machine.cpu}, {machine.num_cores} cores, {format_bytes(machine.memory_bytes)}",
        ),
        ("devices", ", ".join(sorted({rank.device for rank in about.layout.ranks}))),
        ("transport", about.settings.transport),
        ("versions", ", ".join(f"{name} {version}" for name, version in about.versions.items())),
    ]


def _workload(work: RequestWorkload | ImageWorkload) -> str:
    if isinstance(work, ImageWorkload):
        return image_workload(work)
    return f"{work.batch} requests of {work.input_len} tokens in, {work.output_len} out"


def _figures(about: RunAbout, profile: Profile) -> list[tuple[str, str]]:
    found, work = profile.throughput, about.workload
    if isinstance(found, ImageThroughput):
        return image_figures(found, work) if isinstance(work, ImageWorkload) else []
    most_used = max((step.cache_usage for step in profile.steps), default=0.0)
    return [
        ("output", f"{found.output_tokens_per_s:.1f} tokens/s"),
        ("in all", f"{found.total_tokens_per_s:.1f} tokens/s"),
        ("requests", f"{found.requests_per_s:.2f} a second"),
        ("took", f"{found.elapsed_s:.2f} s"),
        ("preemptions", str(found.num_preemptions)),
        ("KV cache", f"{most_used:.1%} at most"),
    ]


def _bytes(name: str, memory: RankMemory) -> RankBytes:
    return RankBytes(
        name,
        {
            "weights_held": memory.weight_resident_bytes,
            "kv_held": memory.cache_resident_bytes or 0,
            "activations": memory.activation_bytes or 0,
            "communication": memory.communication_bytes,
            "other": memory.other_bytes,
        },
        memory.cache_bytes,
    )
