"""Runs a workload once more than it counts, and keeps all that was measured of it."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import numpy as np

from bireme import __version__
from bireme.bench.latency import PERCENTILES
from bireme.bench.throughput import ThroughputResult
from bireme.bench.workload import Workload
from bireme.engine.llm import LLM
from bireme.observe.collectives import collectives_by_size
from bireme.observe.ledger import make_ledger
from bireme.observe.run_folder import CacheUse, Run, write_run
from bireme.observe.told import ToldLedger


class _Watch:
    """What deltas say of time, and what the scheduler is at while they come."""

    def __init__(self, llm: LLM) -> None:
        self._scheduler = llm.start().scheduler
        self.first_s: dict[int, float] = {}
        self._last_s: dict[int, float] = {}
        self.between_s: list[float] = []
        self.running: list[int] = []
        self.most_used, self.most_waiting, self.num_tokens = 0.0, 0, 0

    def note(self, index: int, num_tokens: int, time_s: float) -> None:
        if num_tokens:
            if index in self._last_s:
                self.between_s.append(time_s - self._last_s[index])
            self.first_s.setdefault(index, time_s)
            self._last_s[index] = time_s
        self.num_tokens += num_tokens
        self.running.append(self._scheduler.num_running)
        self.most_used = max(self.most_used, self._scheduler.blocks.usage)
        self.most_waiting = max(self.most_waiting, self._scheduler.num_waiting)

    def latency_s(self, start_s: float) -> dict[str, dict[str, float]]:
        return {
            "ttft": _percentiles([time_s - start_s for time_s in self.first_s.values()]),
            "itl": _percentiles(self.between_s),
            "e2e": _percentiles([time_s - start_s for time_s in self._last_s.values()]),
        }


def profile(llm: LLM, workload: Workload, folder: Path, *, done: Callable[[int, int], None]) -> Run:
    """Writes the run; the first time through, with other prompts, warms up. `done` gets the requests that ended
    and the tokens that came since its last call."""
    engine = llm.start()
    for _ in llm.stream(
        *dataclasses.replace(workload, seed=workload.seed + 1).make(_vocabulary(llm))
    ):
        pass
    before = engine.scheduler.num_preemptions
    prompts, params = workload.make(_vocabulary(llm))
    watch = _Watch(llm)
    start_ns, start_s = time.monotonic_ns(), engine.clock()
    for delta in llm.stream(prompts, params):
        watch.note(delta.index, len(delta.token_ids), delta.time_s)
        done(delta.output is not None, len(delta.token_ids))
    end_ns = time.monotonic_ns()
    num_preemptions = engine.scheduler.num_preemptions - before
    result = ThroughputResult(
        workload,
        (end_ns - start_ns) / 1e9,
        sum(map(len, prompts)),
        watch.num_tokens,
        num_preemptions,
    )
    recorded = llm.recorded().since(start_ns)
    run = Run(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        versions={"bireme": __version__, "torch": version("torch")},
        setup=llm.setup(),
        result=result.as_json(),
        latency_s=watch.latency_s(start_s),
        num_running=mean(watch.running),
        cache=CacheUse(watch.most_used, watch.most_waiting, num_preemptions),
        stats=llm.stats(),
        ledger=ToldLedger.of(make_ledger(recorded)),
        collectives=collectives_by_size(recorded),
    )
    write_run(folder, run, recorded)
    return run


def _vocabulary(llm: LLM) -> int:
    return llm.model.config.vocab_size


def _percentiles(values: list[float]) -> dict[str, float]:
    found = np.percentile(values or [0.0], PERCENTILES)
    return {f"p{share}": float(value) for share, value in zip(PERCENTILES, found, strict=True)}
