"""What slows a GPU's clocks down while steps run: asked of nvidia-smi, which is read and never told anything."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations

import torch

from bireme.observe.profile_records import RankClocks

_REASONS = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")
_EVERY_MS = 200
_EXIT_S = 10.0


@dataclass
class Clocks:
    """What was said while they were watched: lines of uuid, MHz, and a reason each."""

    lines: list[str] = field(default_factory=list)

    def of_ranks(self, devices: Sequence[str]) -> list[RankClocks]:
        """Of the ranks' GPUs, as torch names them; of nothing where nobody was asked."""
        if not self.lines:
            return []
        found = (
            rank_clocks(rank, uuid_of(device), self.lines) for rank, device in enumerate(devices)
        )
        return [it for it in found if it is not None]


def uuid_of(device: str) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def rank_clocks(rank: int, uuid: str, lines: Sequence[str]) -> RankClocks | None:
    """Of the lines about one GPU; None where there is none."""
    rows = [[word.strip() for word in line.split(",")] for line in lines]
    its = [
        row for row in rows if row[0].removeprefix("GPU-") == uuid and len(row) == 2 + len(_REASONS)
    ]
    if not its:
        return None
    active = {
        reason: sum(row[2 + place] == "Active" for row in its) / len(its)
        for place, reason in enumerate(_REASONS)
    }
    speeds = [float(row[1]) for row in its]
    return RankClocks(
        rank=rank,
        num_samples=len(its),
        least_mhz=min(speeds),
        most_mhz=max(speeds),
        slowdowns={reason: share for reason, share in active.items() if share},
    )


@contextmanager
def watched_clocks(devices: Sequence[str]) -> Iterator[Clocks]:
    """Of all GPUs, as long as the context lasts; of none where ranks are on CPUs, or nvidia-smi is missing."""
    clocks, command = Clocks(), shutil.which("nvidia-smi")
    if command is None or any(device == "cpu" for device in devices):
        yield clocks
        return
    fields = ",".join(["uuid", "clocks.sm", *(f"clocks_event_reasons.{it}" for it in _REASONS)])
    arguments = [f"--query-gpu={fields}", "--format=csv,noheader,nounits", f"--loop-ms={_EVERY_MS}"]
    with tempfile.TemporaryFile("w+") as out:
        asked = subprocess.Popen(
            [command, *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.DEVNULL
        )
        try:
            yield clocks
        finally:
            asked.terminate()
            asked.wait(_EXIT_S)
        out.seek(0)
        clocks.lines += out.read().splitlines()


def without_peer_access(devices: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of GPUs that cannot reach each other's memory."""
    gpus = sorted({device for device in devices if device != "cpu"})
    return [
        (one, other)
        for one, other in combinations(gpus, 2)
        if not torch.cuda.can_device_access_peer(one, other)
    ]
