"""What is wrong with hosts that were checked; `docs/doctor.md` has a section on each rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bireme.config import format_bytes
from bireme.doctor.finding import Finding
from bireme.doctor.preflight.messages import Report

_CLOCK_S = 0.1
_LEAST_BYTES_PER_S = 100e6  # gigabit Ethernet carries some 117
_MOST_LATENCY_S = 2e-3

Rule = Callable[[Report], Iterator[Finding]]


def unreachable(found: Report) -> Iterator[Finding]:
    came = [host.facts.name for host in found.hosts]
    if len(came) < found.num_expected:
        yield Finding(
            rule="unreachable",
            title=f"{found.num_expected - len(came)} of {found.num_expected} hosts did not come",
            figure=f"{len(came)} came within {found.timeout_s:g} s: {', '.join(came)}",
            remedy="run bireme doctor --preflight --join on the others; see that they reach the address that is "
            "listened at, and that no firewall is between",
            share=1.0,
        )
    failures = [(host.facts.name, *it) for host in found.hosts for it in host.unreachable.items()]
    if failures:
        name, other, why = failures[0]
        yield Finding(
            rule="unreachable",
            title=f"{name} cannot reach {other}",
            figure=why + (f" (and {len(failures) - 1} more ways)" if len(failures) > 1 else ""),
            remedy="ranks listen at ports that the system chooses: let these hosts reach each other at any port of "
            "these addresses",
            share=1.0,
        )
    if found.failure is not None:
        yield Finding(
            rule="unreachable",
            title="the hosts cannot sum together",
            figure=found.failure,
            remedy="see what gloo or NCCL says (NCCL_DEBUG=INFO), and that the interface is the one that was given",
            share=1.0,
        )


def versions_differ(found: Report) -> Iterator[Finding]:
    names = {name: None for host in found.hosts for name in host.facts.versions}
    for name in names:
        values = {host.facts.name: host.facts.versions.get(name, "none") for host in found.hosts}
        if len(set(values.values())) > 1:
            yield Finding(
                rule="versions-differ",
                title=f"hosts have different versions of {name}",
                figure=_by_host(values),
                remedy=f"install the same {name} everywhere",
                share=0.9,
            )


def artifacts_differ(found: Report) -> Iterator[Finding]:
    values = {host.facts.name: host.facts.artifact or "none was given" for host in found.hosts}
    if len(set(values.values())) > 1:
        yield Finding(
            rule="artifacts-differ",
            title="hosts have different artifacts",
            figure=f"hashes of their manifests: {_by_host(values)}",
            remedy="copy one to all of them, and name it everywhere",
            share=0.9,
        )


def clock_offset(found: Report) -> Iterator[Finding]:
    for host in found.hosts:
        if abs(host.clock_ahead_s) - host.clock_within_s > _CLOCK_S:
            where = "ahead of" if host.clock_ahead_s > 0 else "behind"
            yield Finding(
                rule="clock-offset",
                title=f"the clock of {host.facts.name} is wrong",
                figure=f"{abs(host.clock_ahead_s):.3f} s {where} that of {found.hosts[0].facts.name}, to within "
                f"{1000 * host.clock_within_s:.1f} ms",
                remedy="keep both by NTP: logs cannot be compared, and certificates and tokens are refused",
                share=0.1,
            )


def slow_network(found: Report) -> Iterator[Finding]:
    for sums in found.sums:
        small, large = sums.points[0], sums.points[-1]
        rate = large.size_per_s
        least_s = small.p10_s or small.seconds  # what is above it was waiting for a core
        if rate < _LEAST_BYTES_PER_S or least_s > _MOST_LATENCY_S:
            yield Finding(
                rule="slow-network",
                title=f"sums between {' and '.join(sums.hosts)} are slow",
                figure=f"{rate / 1e6:.0f} MB/s of {format_bytes(large.size)} over {sums.transport}, where "
                f"{_LEAST_BYTES_PER_S / 1e6:.0f} is little; {1e3 * least_s:.2f} ms of {format_bytes(small.size)}, "
                f"where {1e3 * _MOST_LATENCY_S:.0f} is much",
                remedy="use another interface (--listen and --join choose it by its address), or cut the model so that "
                "stages, not tensor groups, span hosts",
                share=0.5,
            )


RULES: dict[str, Rule] = {
    rule.__name__.replace("_", "-"): rule
    for rule in (unreachable, versions_differ, artifacts_differ, clock_offset, slow_network)
}


def examine_hosts(found: Report) -> list[Finding]:
    """The one that costs most first."""
    findings = [finding for rule in RULES.values() for finding in rule(found)]
    return sorted(findings, key=lambda finding: -finding.share)


def _by_host(values: dict[str, str]) -> str:
    return ", ".join(f"{host} {value}" for host, value in values.items())
