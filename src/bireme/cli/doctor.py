"""Say what is wrong with a running server, a run or an artifact, the figure behind it, and what to do.

In an expert's order: the files, where time goes, collectives, memory, the batch, the machine. What costs
most comes first. Exit status 1 where something was found.

--preflight checks hosts instead, before anything starts over them: one listens (--listen), the others come
to it (--join), and each may name its copy of the ARTIFACT.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from bireme.cli import options
from bireme.cli.grouped import flattened
from bireme.cli.preflight import PreflightOptions, check_hosts, check_none_given, print_hosts
from bireme.errors import RequestError

if TYPE_CHECKING:
    from bireme.doctor.evidence import Evidence
    from bireme.doctor.finding import Finding
    from bireme.observe.run_folder import RunFolder

NAME = "doctor"
SHORT = "Say what is wrong, why, and what to do."


@flattened
def run(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN|URL|ARTIFACT|FILE.sqlite",
            help="Of bireme profile or pipeline -o, a server, a sharded checkpoint, or an export of Nsight Systems.",
        ),
    ] = None,
    *,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", help="Of a server: how long to watch it.")
    ] = 5.0,
    api_key: options.ApiKey = None,
    hosts: PreflightOptions,
    as_json: options.JsonOutput = False,
) -> int:
    if hosts.preflight:
        report = check_hosts(hosts, source)
        if as_json:
            typer.echo(msgspec.json.encode(report))
        else:
            print_hosts(report)
            _print_all(f"{len(report.hosts)} hosts", report.findings)
        return 1 if report.findings else 0
    check_none_given(hosts)
    if source is None:
        raise RequestError("name a RUN, a URL, an ARTIFACT or a FILE.sqlite, or give --preflight")
    from bireme.doctor.rules import examine

    found = _evidence(source, seconds, api_key)
    findings = examine(found)
    if as_json:
        told = [msgspec.to_builtins(finding) | {"page": finding.page} for finding in findings]
        typer.echo(
            msgspec.json.encode({"source": found.source, "findings": told, "notes": found.notes})
        )
    else:
        _print_all(found.source, findings)
        for note in found.notes:
            typer.echo(f"note: {note}")
    return 1 if findings else 0


def _print_all(source: str, findings: list[Finding]) -> None:
    for number, finding in enumerate(findings, 1):
        _print(number, finding)
    if not findings:
        typer.echo(f"{source}: nothing found")


def _evidence(source: str, seconds: float, api_key: str | None) -> Evidence:
    from bireme.doctor.evidence import Evidence
    from bireme.observe.run_folder import ABOUT, RunFolder

    if options.is_url(source):
        options.check_seconds(seconds)
        from bireme.doctor.from_server import ask_server

        return ask_server(source, api_key, seconds)
    options.check_no_address(source)
    folder = Path(source)
    if (folder / ABOUT).exists():
        return _of_run(RunFolder(folder))
    if folder.suffix == ".sqlite":
        from bireme.doctor.from_nsys import read_nsys

        return read_nsys(folder)
    from bireme.cli.progress import bytes_bar
    from bireme.doctor.files import certified, check_artifact, damage, num_bytes, weight_facts

    check_artifact(folder)
    with bytes_bar("checking", num_bytes(folder), quiet=False) as advance:
        found = damage(folder, advance)
    proof = certified(folder)
    return Evidence(
        source=source,
        ranks=weight_facts(folder),
        damage=found,
        departures=proof.departures,
        notes=proof.notes,
    )


def _of_run(run: RunFolder) -> Evidence:
    from bireme.cli.progress import bytes_bar
    from bireme.doctor.files import num_bytes
    from bireme.doctor.from_run import artifact_of, evidence_of

    files = artifact_of(run)
    if files is None:
        return evidence_of(run)
    with bytes_bar("checking", num_bytes(files), quiet=False) as advance:
        return evidence_of(run, progress=advance)


def _print(number: int, finding: Finding) -> None:
    typer.echo(f"{number}. {finding.title} ({finding.rule})")
    typer.echo(f"   found  {finding.figure}")
    typer.echo(f"   do     {finding.remedy}")
    typer.echo(f"   more   {finding.page}")
