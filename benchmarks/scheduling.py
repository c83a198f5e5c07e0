"""What a step costs the engine before any device works: scheduling, encoding, and taking its output.

Plain Python on one core, no ranks: 256 requests decode while 2,000 wait. Kept in
`benchmarks/results/scheduling.json`.
"""

from __future__ import annotations

import argparse
import statistics
import time

import record

from bireme.engine.messages import Execute, frame
from bireme.engine.scheduler import Scheduler, SchedulerLimits
from bireme.parallel.layout import CacheKind
from bireme.request import Request, StepOutput
from bireme.sampling_params import SamplingParams

NUM_STEPS = 400


def full_scheduler(num_running: int, num_waiting: int, pp_size: int) -> Scheduler:
    limits = SchedulerLimits(
        pp_size=pp_size, max_num_seqs=num_running, max_num_batched_tokens=8192, block_size=16
    )
    plan = Scheduler(limits, [CacheKind(None, num_running * 64)])
    params = SamplingParams(temperature=0, max_tokens=NUM_STEPS + 200)
    for index in range(num_running + num_waiting):
        prompt = tuple(range(index, index + 64))
        plan.add(Request(request_id=str(index), prompt_token_ids=prompt, params=params, seed=index))
    return plan


def measure(pp_size: int, num_running: int, num_waiting: int) -> dict[str, float]:
    """Medians of a step of all running requests, in microseconds."""
    plan = full_scheduler(num_running, num_waiting, pp_size)
    taken: dict[str, list[float]] = {"schedule": [], "encode": [], "update": []}
    num_bytes: list[int] = []
    in_flight = []
    for _ in range(NUM_STEPS):
        start = time.perf_counter()
        batch = plan.schedule()
        scheduled = time.perf_counter()
        if batch is not None:
            data = frame(Execute(batch))
            encoded = time.perf_counter()
            in_flight.append(batch)
            if not batch.setups:
                taken["schedule"].append(scheduled - start)
                taken["encode"].append(encoded - scheduled)
                num_bytes.append(len(data))
            continue
        batch = in_flight.pop(0)
        slots = batch.sampling_slots
        output = StepOutput(*batch.header, slots, [[7]] * len(slots))
        start = time.perf_counter()
        plan.update(output)
        taken["update"].append(time.perf_counter() - start)
    figures = {f"{name}_us": statistics.median(times) * 1e6 for name, times in taken.items()}
    return figures | {"message_bytes": statistics.median(num_bytes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--waiting", type=int, default=2000)
    args = parser.parse_args()
    results = []
    for pp_size in (1, 4):
        figures = measure(pp_size, args.running, args.waiting)
        shown = ", ".join(f"{name} {value:.0f}" for name, value in figures.items())
        print(f"pp {pp_size}, {args.running} running, {args.waiting} waiting: {shown}")
        results.append({"pp_size": pp_size, **figures})
    record.write(
        "scheduling",
        ["bireme", "msgspec"],
        {"running": args.running, "waiting": args.waiting, "medians": results},
    )


if __name__ == "__main__":
    main()
