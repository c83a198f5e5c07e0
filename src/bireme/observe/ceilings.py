"""What the machine can do at most, as cluster.toml tells of the devices that a run used."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bireme.cluster.file import read_cluster
from bireme.cluster.topology import Cluster, Curve, Device, Group, Link, Node
from bireme.observe.profile_records import ClusterUsed
from bireme.observe.run_records import RunLayout, RunSettings


def seconds_of(curve: Curve, size: float) -> float:
    """What a size takes: straight between two points, the least below the first, and the last one's
    rate beyond the last. `curve` has a point."""
    sizes = [point.size for point in curve]
    at = bisect_left(sizes, size)
    if at == 0:
        return curve[0].seconds
    if at == len(curve):
        return size / curve[-1].size_per_s
    before, after = curve[at - 1], curve[at]
    share = (size - before.size) / (after.size - before.size)
    return before.seconds + share * (after.seconds - before.seconds)


@dataclass(frozen=True)
class Ceilings:
    """Of one run. Each is None where the file does not say it; `notes` say why."""

    used: ClusterUsed
    notes: list[str]
    cluster: Cluster
    devices: Sequence[Device | None]  # by rank
    names: Sequence[str]  # of those in the file, by rank
    transport: str

    def flop_per_s(self, rank: int, dtype: str) -> float | None:
        device = self.devices[rank]
        return None if device is None else device.flop_per_s.get(dtype)

    def memory_bytes_per_s(self, rank: int) -> float | None:
        device = self.devices[rank]
        return None if device is None else device.memory_bytes_per_s

    def all_reduce_bytes_per_s(self, ranks: Sequence[int], num_bytes: int) -> float | None:
        """Of a sum over these ranks; where they were not summed over, over as many of their kind."""
        curve = self._sums(ranks)
        return num_bytes / seconds_of(curve, num_bytes) if curve else None

    def most_all_reduce_bytes_per_s(self, ranks: Sequence[int]) -> float | None:
        """Of the size that moves fastest."""
        return max((point.size_per_s for point in self._sums(ranks)), default=None)

    def _sums(self, ranks: Sequence[int]) -> Curve:
        group = self._group([self.names[rank] for rank in ranks])
        return () if group is None else group.all_reduce

    def send_bytes_per_s(self, src: int, dst: int, num_bytes: int) -> float | None:
        link = self._link({self.names[src], self.names[dst]})
        if link is None:
            return None
        by_rate = link.latency_s + num_bytes / link.bytes_per_s
        return num_bytes / (seconds_of(link.send, num_bytes) if link.send else by_rate)

    def _group(self, names: Sequence[str]) -> Group | None:
        like = [
            group
            for group in self.cluster.groups
            if len(group.devices) == len(names) and group.transport in ("", self.transport)
        ]
        exact = (group for group in like if set(group.devices) == set(names))
        return next(exact, like[0] if like else None)

    def _link(self, names: set[str]) -> Link | None:
        """Between these devices, or their nodes; the CPUs of a host are alike, so that any pair does."""
        like = [link for link in self.cluster.links if link.transport in ("", self.transport)]
        nodes = {name.partition("/")[0] for name in names}
        for wanted in (names, nodes):
            for link in like:
                if wanted <= set(link.between):
                    return link
        is_cpu = all(device is not None and device.kind == "cpu" for device in self.devices)
        return like[0] if like and is_cpu else None


def ceilings_of(
    path: Path, layout: RunLayout, settings: RunSettings, host: str, cluster: Cluster | None = None
) -> Ceilings:
    """From the file at `path`; ConfigError where it is none. `host` is where the ranks ran."""
    cluster = cluster or read_cluster(path)
    notes: list[str] = []
    node = next((one for one in cluster.nodes if one.name == host), cluster.nodes[0])
    if node.name != host:
        notes.append(f"{path} is of {node.name}, and this is {host}: ceilings are that one's")
    devices = [_device(node, rank.rank, rank.device) for rank in layout.ranks]
    missing = [
        rank.device if rank.device != "cpu" else f"cpu{rank.rank}"
        for rank, found in zip(layout.ranks, devices, strict=True)
        if found is None
    ]
    if missing:
        notes.append(f"{path} says nothing of {', '.join(missing)}: no ceilings there")
    if told := _shares(devices, settings):
        notes.append(f"{path} {told}")
        devices = [None] * len(devices)
    transports = {group.transport for group in cluster.groups}
    transports |= {link.transport for link in cluster.links}
    if transports and not transports & {"", settings.transport}:
        found = ", ".join(sorted(transports))
        notes.append(
            f"{path} is of sums and messages through {found}, these went through {settings.transport}: "
            "no ceilings of them"
        )
    measured = cluster.measured
    return Ceilings(
        ClusterUsed(
            path=str(path),
            measured=measured.date if measured else None,
            is_quick=measured.is_quick if measured else False,
        ),
        notes,
        cluster,
        devices,
        [f"{node.name}/{_name(rank.device, rank.rank)}" for rank in layout.ranks],
        settings.transport,
    )


def _name(device: str, rank: int) -> str:
    """As the probe names them: cuda1, cpu0."""
    return f"cpu{rank}" if device == "cpu" else device.replace(":", "")


def _device(node: Node, rank: int, device: str) -> Device | None:
    """Of a host's CPU ranks any is like the others."""
    wanted, kind = _name(device, rank), device.partition(":")[0]
    exact = (one for one in node.devices if one.name == wanted)
    alike = (one for one in node.devices if one.kind == kind == "cpu")
    return next(exact, next(alike, None))


def _shares(devices: Sequence[Device | None], settings: RunSettings) -> str | None:
    """Why figures of a rank's share of the cores are not those of this run's ranks."""
    for device in devices:
        threads = device.num_threads if device is not None else None
        if threads is not None and threads != settings.num_threads:
            return (
                f"is of ranks with {threads} threads, these have {settings.num_threads}: "
                f"probe with as many ranks for ceilings of compute and memory"
            )
    return None
