"""The driver's side: joins worlds of ranks, and asks them until a point has had its time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol, TypeVar

import msgspec

from bireme.cluster.topology import Point
from bireme.config import Transport
from bireme.engine.deadline import Patience
from bireme.engine.joining import WorldPlan, join_world, threads_per_rank
from bireme.engine.pool import WorkerPool
from bireme.engine.world import World
from bireme.errors import EngineError
from bireme.parallel.segment_plan import is_supported
from bireme.planning.probe.messages import (
    ROW_BYTES,
    Describe,
    EmptyStep,
    Facts,
    Measure,
    Samples,
    Work,
)
from bireme.planning.probe.statistics import MIN_REPEATS, num_repeats, summarise

T = TypeVar("T", bound=msgspec.Struct)
_START_S = 300.0  # for processes to start and to join
_ANSWER_S = 120.0
_WARMUP = 2  # repeats that do not count, each time
_PILOT_REPEATS = 3
_BATCHES = 4  # of a point, where it is slow enough; more where it is faster


def carrier(devices: Sequence[str], transport: Transport) -> str:
    """What sums and messages between ranks on `devices` go through."""
    if devices[0] != "cpu":
        return "nccl"  # and sums of a few rows, where GPUs map each other's memory, through that
    return "shared memory" if transport == "auto" and is_supported() else "gloo"


@contextmanager
def joined(
    pool: WorkerPool,
    devices: Sequence[str],
    widths: Sequence[int],
    transport: Transport,
    largest_bytes: int = 1,
) -> Iterator[ProbedWorld]:
    """A world of one rank a device, whose stages send at most `largest_bytes` at a time."""
    names = [f"rank {rank} ({device})" for rank, device in enumerate(devices)]
    plan = WorldPlan(
        widths=tuple(widths),
        devices=tuple(devices),
        hidden_bytes=largest_bytes,
        sampled_bytes=largest_bytes,
        num_threads=threads_per_rank(len(devices)),
        transport=transport,
        step_timeout_s=_ANSWER_S,
        start_timeout_s=_START_S,
        row_bytes=ROW_BYTES if transport == "auto" else 0,
    )
    world = World(pool, names, plan.widths, _ANSWER_S)
    with ExitStack() as held:
        held.callback(world.close)
        join_world(world, plan, held)
        yield ProbedWorld(world)
        world.leave(_ANSWER_S)


class Asked(Protocol):
    """Ranks that are all told the same, and each answer."""

    def send_all(self, command: msgspec.Struct, /) -> None: ...

    def gather(self, timeout_s: float, doing: str, /) -> list[msgspec.Struct]: ...


class Probed:
    """Ranks that measure, all at once: a rank's figures hold while the others are at work too."""

    def __init__(self, ranks: Asked) -> None:
        self._ranks = ranks

    def facts(self) -> list[Facts]:
        return self._ask(Describe(), Facts)

    def local(self, work: Work, size: int, budget_s: float) -> list[Point]:
        """Of each rank, by itself."""
        return [summarise(size, seconds) for seconds in self._samples(work, budget_s)]

    def shared(self, work: Work, size: int, budget_s: float) -> Point:
        """Of what all do together: each repeat is the mean over the ranks."""
        each = zip(*self._samples(work, budget_s), strict=True)
        return summarise(size, [statistics.fmean(seconds) for seconds in each])

    def _samples(self, work: Work, budget_s: float) -> list[list[float]]:
        """Seconds of each rank, of batch after batch until the budget is spent: what else the machine
        is at changes by the tenth of a second."""
        batch, end = self._measure(work, _PILOT_REPEATS), time.monotonic() + budget_s
        if _repeat_s(batch) * MIN_REPEATS > budget_s:
            return [one.seconds for one in batch]
        found: list[list[float]] = [[] for _ in batch]
        while time.monotonic() < end:
            batch = self._measure(work, num_repeats(_repeat_s(batch), budget_s / _BATCHES))
            for seconds, one in zip(found, batch, strict=True):
                seconds += one.seconds
        return found

    def _measure(self, work: Work, repeats: int) -> list[Samples]:
        return self._ask(Measure(work, _WARMUP, repeats), Samples)

    def _ask(self, question: msgspec.Struct, kind: type[T]) -> list[T]:
        self._ranks.send_all(question)
        replies = self._ranks.gather(_ANSWER_S, "being measured")
        for reply in replies:
            if not isinstance(reply, kind):
                raise EngineError(f"a rank answered a question with {type(reply).__name__}")
        return [reply for reply in replies if isinstance(reply, kind)]


class ProbedWorld(Probed):
    """The ranks of a world."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._world = world

    def empty_step(self, budget_s: float) -> Point:
        """From the driver through all ranks and back."""
        pilot = [self._empty_step_s() for _ in range(_WARMUP + _PILOT_REPEATS)]
        repeats = num_repeats(statistics.median(pilot), budget_s)
        taken = [self._empty_step_s() for _ in range(repeats)]
        return summarise(len(self._world.ranks), taken)

    def _empty_step_s(self) -> float:
        start = time.perf_counter()
        self._world.send_all(EmptyStep())
        self._world.step_reply(Patience(_ANSWER_S, _ANSWER_S), 0)
        return time.perf_counter() - start


def _repeat_s(batch: list[Samples]) -> float:
    """What one repeat takes the slowest rank."""
    return max(statistics.median(one.seconds) * one.num_calls for one in batch)
