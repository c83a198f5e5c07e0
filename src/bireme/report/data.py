"""What a report shows of a run: every figure is one of its run folder, computed by whoever computes it elsewhere."""

from __future__ import annotations

import msgspec

from bireme.config import format_bytes
from bireme.doctor.finding import Finding
from bireme.doctor.from_run import evidence_of
from bireme.doctor.rules import examine
from bireme.observe.gantt import Gantt
from bireme.observe.ledger import make_ledger
from bireme.observe.profile_records import (
    CollectiveSize,
    MessageSize,
    Profile,
    RankMemory,
    SizePass,
)
from bireme.observe.run_folder import RunFolder
from bireme.observe.run_records import RunAbout, RunRank
from bireme.observe.told import ToldLedger

_MOST_BARS = 60_000  # of all ranks; what is shorter is put together, as in a line of a terminal


class RankBytes(msgspec.Struct, frozen=True):
    """Bytes of one rank by kind."""

    name: str
    bytes: dict[str, int]


class RunData(msgspec.Struct, frozen=True, kw_only=True):
    """One run, as `report.js` draws it. `facts` and `figures` are (what, value) for people."""

    name: str
    title: str
    facts: list[tuple[str, str]]
    figures: list[tuple[str, str]]
    findings: list[Finding]
    latency_s: dict[str, dict[str, float]]
    ranks: list[RunRank]
    ledger: ToldLedger
    gantt: Gantt
    memory: list[RankBytes]
    collectives: list[CollectiveSize]
    messages: list[MessageSize]
    batches: list[SizePass]
    chunks: list[SizePass]
    notes: list[str]


def run_data(run: RunFolder) -> RunData:
    """UserError where the folder is damaged."""
    about, profile = run.about, run.profile
    ledger = make_ledger(run.recorded)
    num_columns = max(1, _MOST_BARS // (2 * len(ledger.ranks)))
    names = about.layout.names
    return RunData(
        name=run.path.name,
        title=f"{about.model.name}: {layout_text(about)}, {about.model.dtype}",
        facts=_facts(about),
        figures=_figures(profile),
        findings=examine(evidence_of(run)),
        latency_s={
            "to the first token": profile.latency.ttft_s,
            "between tokens": profile.latency.itl_s,
            "end to end": profile.latency.e2e_s,
            "in the queue": profile.latency.queue_s,
        },
        ranks=about.layout.ranks,
        ledger=run.ledger.told,
        gantt=Gantt.of(ledger, num_columns),
        memory=[_bytes(*pair) for pair in zip(names, profile.memory, strict=True)],
        collectives=profile.collectives,
        messages=profile.messages,
        batches=profile.batches,
        chunks=profile.chunks,
        notes=profile.notes,
    )


def layout_text(about: RunAbout) -> str:
    widths = about.layout.widths
    if len(set(widths)) == 1:
        return f"tp {widths[0]} x pp {len(widths)}"
    return f"tp {','.join(map(str, widths))} (pp {len(widths)})"


def _facts(about: RunAbout) -> list[tuple[str, str]]:
    machine, work = about.hardware, about.workload
    return [
        ("command", " ".join(about.command)),
        ("when", about.date.isoformat(sep=" ")),
        (
            "workload",
            f"{work.batch} requests of {work.input_len} tokens in, {work.output_len} out",
        ),
        ("layers a stage", ", ".join(map(str, about.layout.layers_per_stage))),
        (
            "host",
            f"{machine.host}: {machine.cpu}, {machine.num_cores} cores, {format_bytes(machine.memory_bytes)}",
        ),
        ("devices", ", ".join(sorted({rank.device for rank in about.layout.ranks}))),
        ("transport", about.settings.transport),
        ("versions", ", ".join(f"{name} {version}" for name, version in about.versions.items())),
    ]


def _figures(profile: Profile) -> list[tuple[str, str]]:
    found = profile.throughput
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
            "weights": memory.weight_bytes,
            "kv": memory.cache_bytes,
            "activations": memory.activation_bytes or 0,
            "communication": memory.communication_bytes,
            "other": memory.other_bytes,
        },
    )
