"""Plants delays into rank processes, which know nothing of it, and compares what ledgers say."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median

import pytest

from bireme.chrome_trace import Recorded
from bireme.engine.messages import LANGUAGE_MODEL, Program
from bireme.engine.pool import WorkerPool
from bireme.observe.causes import Row
from bireme.observe.ledger import Ledger, make_ledger
from bireme.vision.model import find_model

NETWORK = find_model("planted.slow_network:SlowNetwork", None, image_size=32)
TOLERANCE = 0.05  # of what was planted
DELAYS_S = (0.2, 0.35, 0.6)
IDLE_S = 0.1  # after which ranks wake up as slowly as after any longer sleep
MAX_RUNS = 9
MAX_TRIES = 4  # at one run in which nothing is stolen
Rows = Mapping[Row, int]  # nanoseconds
Interval = tuple[int, int]


@dataclass(frozen=True)
class Planted:
    """What a run's ledger says, and what was planted in each rank's rows."""

    ledger: Ledger
    rows: Sequence[Rows]


def within(intervals: Sequence[Interval], ledger: Ledger) -> int:
    """Nanoseconds of a ledger's window."""
    return sum(
        max(0, min(end, ledger.end_ns) - max(start, ledger.start_ns)) for start, end in intervals
    )


def hold(seconds: float) -> Interval:
    """Lets time pass, and says when. It does not sleep: a host that wakes up is late by as much as its machine
    pleases, which is nobody's delay."""
    start_ns = time.monotonic_ns()
    while time.monotonic_ns() < start_ns + seconds * 1e9:
        os.sched_yield()
    return start_ns, time.monotonic_ns()


class Plant:
    """The folder through which ranks are told how long to be held up, and tell when they were."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._count = folder, count()

    def set(
        self,
        paces_s: Sequence[float],
        delays_s: Mapping[int, float] | None = None,
        passes: range = range(0),
    ) -> None:
        """Each rank's sleep in every pass through its work from here on, and in some of them."""
        for path in self.folder.glob("slept-*"):
            path.unlink()
        serial = next(self._count)
        for rank, pace in enumerate(paces_s):
            delay = (delays_s or {}).get(rank)
            first, stop = (0, 0) if delay is None else (passes.start, passes.stop)
            told = f"{serial} {pace} {delay or 0} {first} {stop}"
            (self.folder / f"rank-{rank}").write_text(told)

    def sleeps(self, rank: int) -> list[Interval]:
        """When a rank's delays were, in nanoseconds."""
        lines = (self.folder / f"slept-{rank}").read_text().splitlines()
        return [(int(start), int(end)) for start, end in map(str.split, lines)]

    def ledger(self, recorded: Recorded, rank: int) -> Ledger:
        """From the beginning of a rank's first delay to the end of its last."""
        found = self.sleeps(rank)
        return make_ledger(recorded, found[0][0], found[-1][1])


@contextmanager
def goes_first() -> Iterator[None]:
    """This process and its children, where the user may: what else the machine does is no planted delay."""
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, usual)


@contextmanager
def planted_pool(
    folder: Path, program: Program = LANGUAGE_MODEL
) -> Iterator[tuple[WorkerPool, Plant]]:
    """Rank processes that heed the plant."""
    with pytest.MonkeyPatch.context() as patch, goes_first(), WorkerPool(program) as pool:
        here = Path(__file__).parent
        for importable in (here.parent, here, here / "planted"):
            patch.setenv("PYTHONPATH", str(importable), prepend=os.pathsep)
        patch.setenv("PLANTED_DELAYS", str(folder))
        yield pool, Plant(folder)


def check(run: Callable[[float], Planted], least_s: float = 0) -> None:
    """Runs with a delay of `least_s`, and with each of `DELAYS_S` more. What else the machine does is in
    the rows too: where a run was disturbed, the medians of more runs are compared."""
    gc.collect()
    gc.disable()  # it holds up the host
    try:
        run(least_s)  # warms up
        before = [undisturbed(run, least_s)]
        for delay_s in DELAYS_S:
            after = [undisturbed(run, least_s + delay_s)]
            while (problems := differences(before, after)) and len(after) < MAX_RUNS:
                before.append(undisturbed(run, least_s))
                after.append(undisturbed(run, least_s + delay_s))
            assert not problems, "\n".join(problems)
    finally:
        gc.enable()


def undisturbed(run: Callable[[float], Planted], delay_s: float) -> Planted:
    """A run of which the machine's host took no time, or the last of some tries."""
    for _ in range(MAX_TRIES):
        before = stolen_ticks()
        planted = run(delay_s)
        if stolen_ticks() == before:
            break
    return planted


def stolen_ticks() -> int:
    """Clock ticks for which virtual cores waited for their host's, since the machine began: see proc(5)."""
    counts = Path("/proc/stat")
    return int(counts.read_text().split(maxsplit=9)[8]) if counts.exists() else 0


def differences(before: Sequence[Planted], after: Sequence[Planted]) -> list[str]:
    """The ranks of which the ledgers tell something else than was planted."""
    problems = []
    for rank, ledger in enumerate(after[-1].ledger.ranks):
        planted = _medians([run.rows[rank] for run in after])
        least = _medians([run.rows[rank] for run in before])
        planted = {row: ns - least.get(row, 0) for row, ns in planted.items()}
        told, old = (_medians([_unplanted(run, rank) for run in runs]) for runs in (after, before))
        errors = {row: told[row] - old[row] for row in Row}
        unattributed = median(abs(run.ledger.ranks[rank].share(Row.UNATTRIBUTED)) for run in after)
        if not is_told(errors, planted) or unattributed > 0.01:
            problems.append(
                f"{ledger.name}: planted {_ms(planted)}, more than that {_ms(errors)}, "
                f"unattributed {unattributed:.1%}, medians of {len(after)}"
            )
    return problems


def is_told(errors: Rows, planted: Rows) -> bool:
    """Each planted row grew by what was planted within 5 %, all others together by less than 5 % of it."""
    others = sum(abs(ns) for row, ns in errors.items() if row not in planted)
    return others < TOLERANCE * sum(planted.values()) and all(
        abs(errors[row]) <= TOLERANCE * delay_ns for row, delay_ns in planted.items()
    )


def _unplanted(run: Planted, rank: int) -> Rows:
    """A rank's rows without what was planted in them."""
    told, planted = run.ledger.ranks[rank].ns, run.rows[rank]
    return {row: told[row] - planted.get(row, 0) for row in Row}


def _medians(runs: Sequence[Rows]) -> dict[Row, int]:
    return {row: int(median(run[row] for run in runs)) for row in runs[0]}


def _ms(rows: Rows) -> dict[str, float]:
    return {row.value: round(ns / 1e6, 2) for row, ns in rows.items() if ns}
