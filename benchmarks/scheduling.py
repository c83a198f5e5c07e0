"""What a step costs the engine before any device works: scheduling, encoding, and taking its output.

Plain Python on one core, no ranks: 256 requests run while 2,000 wait. `steady`: all decode, and none
ends. `churning`: prompts of random ids and answers of 1 to 199 tokens, so that most steps end some
requests and begin others. Kept in `benchmarks/results/scheduling.json`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

import record

from bireme.engine.limits import SchedulerLimits
from bireme.engine.messages import Execute, frame
from bireme.engine.scheduler import Scheduler
from bireme.parallel.layout import CacheKind
from bireme.request import Request, ScheduledBatch, StepOutput
from bireme.sampling_params import SamplingParams

NUM_STEPS = 600
NUM_WARM_UP = 50
BLOCK = 16


@dataclass(frozen=True)
class Mix:
    """`num_prompt` tokens each; answers of up to `most_new` tokens, of exactly as many if `is_steady`."""

    name: str
    num_prompt: int
    most_new: int
    num_batched_tokens: int
    is_steady: bool = False

    def requests(self) -> Iterator[Request]:
        random = Random(0)
        for index in itertools.count():
            num_new = self.most_new if self.is_steady else random.randint(1, self.most_new)
            yield Request(
                request_id=str(index),
                prompt_token_ids=tuple(random.choices(range(30_000), k=self.num_prompt)),
                params=SamplingParams(temperature=0, max_tokens=num_new),
                seed=index,
                arrival_s=float(index),
            )

    def scheduler(self, num_running: int, pp_size: int) -> Scheduler:
        limits = SchedulerLimits(
            pp_size=pp_size,
            max_num_seqs=num_running,
            max_num_batched_tokens=self.num_batched_tokens,
            block_size=BLOCK,
        )
        longest = -(-(self.num_prompt + self.most_new) // BLOCK) + 1
        return Scheduler(limits, [CacheKind(None, num_running * longest)])


MIXES = [
    Mix("steady, prompts of 64", 64, NUM_STEPS * 2, 8192, is_steady=True),
    Mix("churning, prompts of 64", 64, 199, 8192),
    Mix("churning, prompts of 1000", 1000, 199, 2048),
    Mix("churning, prompts of 8000", 8000, 199, 2048),
]


@dataclass
class _Taken:
    """Seconds, a step each."""

    schedule: list[float] = field(default_factory=list)
    encode: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)


def run(mix: Mix, pp_size: int, num_running: int, num_waiting: int) -> _Taken:
    plan, requests, taken = mix.scheduler(num_running, pp_size), mix.requests(), _Taken()
    for request in itertools.islice(requests, num_running):
        plan.add(request)
    in_flight: deque[ScheduledBatch] = deque()
    for _ in range(NUM_STEPS):
        while plan.num_waiting < num_waiting:
            plan.add(next(requests))
        while (batch := _scheduled(plan, taken)) is not None:
            in_flight.append(batch)
        batch = in_flight.popleft()
        slots = batch.sampling_slots
        output = StepOutput(*batch.header, slots, [[7]] * len(slots))
        start = time.perf_counter()
        plan.update(output)
        taken.update.append(time.perf_counter() - start)
    return taken


def _scheduled(plan: Scheduler, taken: _Taken) -> ScheduledBatch | None:
    start = time.perf_counter()
    batch = plan.schedule()
    scheduled = time.perf_counter()
    if batch is not None:
        taken.num_bytes.append(len(frame(Execute(batch))))
        taken.encode.append(time.perf_counter() - scheduled)
        taken.schedule.append(scheduled - start)
    return batch


def figures(taken: _Taken) -> dict[str, float]:
    """Microseconds: medians and 99th percentiles once the mix is under way, and the first step's."""
    found = {"schedule_first_us": taken.schedule[0] * 1e6}
    for name in ("schedule", "encode", "update"):
        seconds = getattr(taken, name)[NUM_WARM_UP:]
        found[f"{name}_us"] = statistics.median(seconds) * 1e6
        found[f"{name}_p99_us"] = statistics.quantiles(seconds, n=100)[98] * 1e6
    return found | {"message_bytes": statistics.median(taken.num_bytes[NUM_WARM_UP:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--waiting", type=int, default=2000)
    args = parser.parse_args()
    results = []
    for mix, pp_size in itertools.product(MIXES, (1, 4)):
        found = figures(run(mix, pp_size, args.running, args.waiting))
        shown = ", ".join(f"{name} {value:.0f}" for name, value in found.items())
        print(f"{mix.name}, pp {pp_size}: {shown}", flush=True)
        results.append({"mix": mix.name, "pp_size": pp_size, **found})
    record.write(
        "scheduling",
        ["bireme", "msgspec"],
        {"running": args.running, "waiting": args.waiting, "results": results},
    )


if __name__ == "__main__":
    main()
