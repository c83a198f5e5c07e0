"""How the processes of a pool become one world: what they share, and what each is told."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass

from bireme.config import Transport
from bireme.engine.channel import QueueSteps, RingSteps, Steps, open_channel
from bireme.engine.messages import Join
from bireme.engine.setup import num_cores
from bireme.engine.world import World
from bireme.parallel.broadcast import RingPlan
from bireme.parallel.counters import SPIN_S, create_memory
from bireme.parallel.peer_room import PeerRoom
from bireme.parallel.segment_plan import SegmentPlan, create_segment, is_supported
from bireme.parallel.shm_helper import load_helper

# where cores compute nothing: a rank that slept begins a step 0.2 ms later, and is slower then (two H200s)
_SPIN_BESIDE_GPU_S = 0.2


def threads_per_rank(num_ranks: int) -> int:
    return max(1, num_cores() // num_ranks)


@dataclass(frozen=True, kw_only=True)
class WorldPlan:
    """Ranks by their stages' widths, one device each; the largest message from stage to stage, and
    of sampled ids back to the first (bytes). `row_bytes`, `sum_bytes`, `sends_beside` as in `PeerRoom`."""

    widths: tuple[int, ...]
    devices: tuple[str, ...]
    hidden_bytes: int
    sampled_bytes: int
    num_threads: int
    transport: Transport
    step_timeout_s: float
    start_timeout_s: float
    row_bytes: int = 0
    sum_bytes: int = 0
    sends_beside: bool = False

    @property
    def room(self) -> PeerRoom:
        if self.transport != "auto":
            return PeerRoom()
        return PeerRoom(
            self.hidden_bytes, self.sampled_bytes, self.row_bytes, self.sum_bytes, self.sends_beside
        )

    @property
    def shares_memory(self) -> bool:
        return self.transport != "distributed" and is_supported()


def join_world(world: World, plan: WorldPlan, held: ExitStack) -> Steps:
    """Returns when all have joined. What they share is let go of with `held`; what can be seen of
    the steps' endpoints may be removed once every rank has heard something."""
    is_compiled = load_helper() is not None
    segment = _segment(plan, held, is_compiled=is_compiled)
    steps = _steps(plan, held, is_compiled=is_compiled)
    meeting_fd, meeting = create_memory(0, "bireme-store")
    held.callback(os.close, meeting_fd)
    held.callback(steps.remove)
    world.channel = open_channel(steps)
    held.callback(world.channel.close)
    for rank, device in enumerate(plan.devices):
        command = Join(
            widths=plan.widths,
            rank=rank,
            store_path=meeting,
            device=device,
            num_threads=plan.num_threads,
            timeout_s=plan.step_timeout_s,
            steps=steps,
            segment=segment,
            room=plan.room,
        )
        world.send(rank, command)
    world.gather(plan.start_timeout_s, "joining the other ranks")
    world.compare_clocks(plan.start_timeout_s)
    return steps


def _segment(
    plan: WorldPlan, held: ExitStack, *, is_compiled: bool
) -> tuple[str, SegmentPlan] | None:
    """Memory that the ranks talk through, where they can: on the CPUs of one host."""
    if set(plan.devices) != {"cpu"} or len(plan.devices) == 1 or not plan.shares_memory:
        return None
    segment = SegmentPlan(
        widths=plan.widths,
        hidden_bytes=plan.hidden_bytes,
        sampled_bytes=plan.sampled_bytes,
        is_compiled=is_compiled,
    )
    fd, path = create_segment(segment)
    held.callback(os.close, fd)
    return path, segment


def _steps(plan: WorldPlan, held: ExitStack, *, is_compiled: bool) -> Steps:
    """Where commands go: through memory, or through sockets in a folder."""
    num_ranks = len(plan.devices)
    if not plan.shares_memory:
        folder = tempfile.mkdtemp(prefix="bireme-")
        return QueueSteps(tuple(f"ipc://{folder}/steps-{rank}" for rank in range(num_ranks)))
    spin_s = SPIN_S if "cpu" in plan.devices else _SPIN_BESIDE_GPU_S
    ring = RingPlan(num_readers=num_ranks, is_compiled=is_compiled, spin_s=spin_s)
    fd, path = create_memory(ring.num_bytes, "bireme-steps")
    held.callback(os.close, fd)
    return RingSteps(path, ring)
