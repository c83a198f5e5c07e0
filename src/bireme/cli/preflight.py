"""`bireme doctor --preflight`: hosts that are checked together, before anything starts over them."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bireme.cli import options
from bireme.cli.tables import console, table
from bireme.errors import RequestError

if TYPE_CHECKING:
    from bireme.doctor.preflight.messages import Report

_CONNECT_S = 10.0


@dataclass(frozen=True)
class PreflightOptions:
    """What `bireme doctor` takes beside."""

    preflight: Annotated[
        bool, typer.Option("--preflight", help="Check hosts, before a start over them.")
    ] = False
    listen: Annotated[
        str | None,
        typer.Option(
            "--listen", metavar="ADDRESS", help="Of the first host: its own; :PORT if wanted."
        ),
    ] = None
    join: Annotated[
        str | None,
        typer.Option(
            "--join", metavar="ADDRESS:PORT", help="Of the others: where the first listens."
        ),
    ] = None
    num_hosts: Annotated[
        int | None,
        typer.Option(
            "--hosts", metavar="N", help="Of the first host: how many in all. [default: 2]"
        ),
    ] = None
    host_name: Annotated[
        str | None,
        typer.Option("--host-name", metavar="NAME", help="Of this host; its own if not given."),
    ] = None
    timeout_s: Annotated[
        float,
        typer.Option(
            "--timeout",
            metavar="S",
            help="How long the first host waits for others, and these for a word of it.",
        ),
    ] = 60.0
    device: options.Device = "auto"


def check_none_given(given: PreflightOptions) -> None:
    """RequestError for what means nothing without --preflight."""
    usual = PreflightOptions()
    for field in fields(PreflightOptions):
        if getattr(given, field.name) != getattr(usual, field.name):
            option = {"num_hosts": "hosts", "timeout_s": "timeout"}.get(field.name, field.name)
            raise RequestError(f"--{option.replace('_', '-')} is for --preflight; give both")


def check_hosts(given: PreflightOptions, artifact: str | None) -> Report:
    """This host and the others; RequestError for what cannot be."""
    if (given.listen is None) == (given.join is None):
        raise RequestError(
            "--preflight needs --listen ADDRESS on one host, and --join ADDRESS:PORT on each of the others"
        )
    if not 0 < given.timeout_s <= options.MOST_SECONDS:
        raise RequestError(
            f"timeout={given.timeout_s:g} must be above 0 and at most {options.MOST_SECONDS}"
        )
    folder = None if artifact is None else Path(artifact)
    return _listen(given, folder) if given.join is None else _join(given, given.join, folder)


def _listen(given: PreflightOptions, artifact: Path | None) -> Report:
    num_hosts = 2 if given.num_hosts is None else given.num_hosts
    options.check_at_least("hosts", num_hosts, 2)
    from bireme.doctor.preflight.checks import listen
    from bireme.doctor.preflight.host import Host
    from bireme.doctor.preflight.place import bound, parse_address

    address, port = parse_address(given.listen or "", "listen", port=0)
    own = Host(_name(given), address, _device(given), artifact)
    try:
        with bound(address, port) as listener:
            place = f"{f'[{address}]' if ':' in address else address}:{listener.getsockname()[1]}"
            _note(
                f"listening at {place} for {num_hosts - 1} more; run there: "
                f"bireme doctor --preflight --join {place}"
            )
            return listen(
                listener, own, num_hosts, given.timeout_s, lambda name: _note(f"{name} has come")
            )
    finally:
        own.close()


def _join(given: PreflightOptions, place: str, artifact: Path | None) -> Report:
    if given.num_hosts is not None:
        raise RequestError("--hosts is for the host that listens; leave it out beside --join")
    import socket

    from bireme.doctor.preflight.checks import come
    from bireme.doctor.preflight.host import Host
    from bireme.doctor.preflight.place import parse_address

    target = parse_address(place, "join")
    try:
        sock = socket.create_connection(target, _CONNECT_S)
    except OSError as error:
        raise RequestError(
            f"join {place} cannot be reached: {error.strerror or error}; see that bireme doctor --preflight --listen "
            "runs there, and that no firewall is between"
        ) from None
    with sock:
        own = Host(_name(given), str(sock.getsockname()[0]), _device(given), artifact)
        try:
            return come(sock, own, place, given.timeout_s)
        finally:
            own.close()


def _name(given: PreflightOptions) -> str:
    name = given.host_name or platform.node() or "localhost"
    if not name.isprintable():
        raise RequestError(f"host_name {name!r} holds control characters; give a plain --host-name")
    return name


def _device(given: PreflightOptions) -> str:
    from bireme.config import EngineConfig
    from bireme.engine.prepare import resolve_devices

    config = EngineConfig(**options.engine_config(device=given.device))
    return resolve_devices(config)[0].partition(":")[0]


def _note(text: str) -> None:
    print(f"bireme: {text}", file=sys.stderr)


def print_hosts(found: Report) -> None:
    """What each host is, and what sums between them take."""
    to, first = console(highlight=False), found.hosts[0].facts.name
    names = list(dict.fromkeys(name for host in found.hosts for name in host.facts.versions))
    hosts = table(
        "host", "address", "interface", *names, "artifact", f"clock ahead of\n{first}, ms"
    )
    for host in found.hosts:
        facts = host.facts
        ahead = f"{1000 * host.clock_ahead_s:.1f} (+-{1000 * host.clock_within_s:.1f})"
        hosts.add_row(
            facts.name, facts.address, facts.interface, *(facts.versions.get(it, "-") for it in names),
            facts.artifact or "-", "0" if facts.name == first else ahead,
        )  # fmt: skip
    to.print(hosts)
    sums = table("sums between", "over", "bytes", "us", "GB/s")
    for one in found.sums:
        for point in one.points:
            sums.add_row(
                ", ".join(one.hosts), one.transport, str(point.size), f"{1e6 * point.seconds:.0f}",
                f"{point.size_per_s / 1e9:.3f}",
            )  # fmt: skip
    if found.sums:
        to.print(sums)
