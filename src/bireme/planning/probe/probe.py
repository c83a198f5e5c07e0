"""The whole measurement: what this machine is, as a `Cluster` of one node."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from bireme import __version__
from bireme.cluster.topology import (
    Cluster,
    Curve,
    Device,
    Group,
    Link,
    Measurement,
    Node,
    Point,
)
from bireme.config import Transport
from bireme.engine.pool import WorkerPool
from bireme.engine.setup import num_cores
from bireme.errors import ConfigError
from bireme.planning.probe import hardware
from bireme.planning.probe.devices import Advance, measure_devices
from bireme.planning.probe.driver import carrier, joined
from bireme.planning.probe.messages import PROBE, AllReduce, Send, Work
from bireme.planning.probe.plan import ProbePlan
from bireme.planning.probe.statistics import latency_and_rate


def probe(
    devices: Sequence[str], plan: ProbePlan, advance: Advance, transport: Transport = "auto"
) -> Cluster:
    """One rank on each of `devices`, named as torch names them; `advance` hears of every point."""
    if devices[0] != "cpu" and len(set(devices)) < len(devices):
        raise ConfigError(f"devices {', '.join(devices)}: each GPU is measured once; name it once")
    start, load = time.monotonic(), hardware.load_average()
    with WorkerPool(PROBE) as pool:
        found = _Probe(pool, devices, plan, advance, transport)
        made, steps = found.devices_and_steps()
        sums, sends = found.sums(), found.sends()
    node = Node(
        name=platform.node() or "localhost",
        cpu=hardware.cpu_model(),
        num_cores=num_cores(),
        memory_bytes=hardware.memory_bytes(),
        empty_step=steps,
        devices=made,
    )
    through = carrier(devices, transport)
    names = [f"{node.name}/{device.name}" for device in made]
    return Cluster(
        measured=Measurement(
            date=datetime.now(UTC).replace(microsecond=0),
            versions=versions_of(devices),
            elapsed_s=round(time.monotonic() - start, 1),
            load_average=load,
            is_quick=plan.is_quick,
        ),
        nodes=(node,),
        links=tuple(
            _link([names[rank] for rank in ranks], through, curve) for ranks, curve in sends.items()
        ),
        groups=tuple(
            Group(devices=tuple(names[rank] for rank in ranks), transport=through, all_reduce=curve)
            for ranks, curve in sums.items()
        ),
    )


def _link(between: Sequence[str], transport: str, curve: Curve) -> Link:
    latency_s, bytes_per_s = latency_and_rate(curve)
    return Link(
        between=tuple(between),
        transport=transport,
        latency_s=latency_s,
        bytes_per_s=bytes_per_s,
        send=curve,
    )


def versions_of(devices: Sequence[str]) -> dict[str, str]:
    """Of what runs on these devices."""
    versions = {
        "bireme": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    if devices[0] != "cpu":
        versions["cuda"] = str(torch.version.cuda)
        versions["nccl"] = hardware.nccl_version() or "unknown"
    return versions


@dataclass
class _Probe:
    """World after world, of the same processes."""

    pool: WorkerPool
    devices: Sequence[str]
    plan: ProbePlan
    advance: Advance
    transport: Transport

    def devices_and_steps(self) -> tuple[tuple[Device, ...], Curve]:
        """Every device by itself; an empty step through 1, 2, ... ranks."""
        num_ranks = len(self.devices)
        steps = [self._empty_step(size) for size in range(1, num_ranks)]
        with (
            tempfile.TemporaryDirectory(prefix="bireme-") as folder,
            joined(self.pool, self.devices, (num_ranks,), self.transport) as world,
        ):
            steps.append(world.empty_step(self.plan.budget_s))
            self.advance(1)
            made = measure_devices(world, self.plan, self.devices, Path(folder), self.advance)
        return made, tuple(steps)

    def _empty_step(self, num_ranks: int) -> Point:
        with joined(self.pool, self.devices[:num_ranks], (num_ranks,), self.transport) as world:
            point = world.empty_step(self.plan.budget_s)
        self.advance(1)
        return point

    def sums(self) -> dict[tuple[int, ...], Curve]:
        """Of every group: a tensor group of that many ranks."""
        chosen = self.plan.groups(len(self.devices))
        return {
            ranks: self._curve(ranks, (len(ranks),), AllReduce, len(chosen)) for ranks in chosen
        }

    def sends(self) -> dict[tuple[int, ...], Curve]:
        """Of every pair: two stages of one rank each. All ranks, where one pair stands for any."""
        num_ranks = len(self.devices)
        chosen = self.plan.pairs(num_ranks)
        found = {ranks: self._curve(ranks, (1, 1), Send, len(chosen)) for ranks in chosen}
        if self.plan.pairs_are_alike:
            return {tuple(range(num_ranks)): curve for curve in found.values()}
        return found

    def _curve(
        self,
        ranks: Sequence[int],
        widths: Sequence[int],
        work: Callable[[int], Work],
        num_curves: int,
    ) -> Curve:
        devices, sizes = [self.devices[rank] for rank in ranks], self.plan.message_bytes
        points = []
        with joined(self.pool, devices, widths, self.transport, sizes[-1]) as world:
            for size in sizes:
                points.append(world.shared(work(size), size, self.plan.budget_s / num_curves))
                self.advance(1)
        return tuple(points)
