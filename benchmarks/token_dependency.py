"""Idle time of four stages while all work waits for ids of a batch in flight, and what it costs.

    python benchmarks/token_dependency.py [--rounds 3] [--tokens 10] [--token-ms 60]

Four real ranks, the demo model at pp 4, each slowed by a sleep for each token inside its COMPUTE
span, so that compute dominates without using a core. In turn, with 4 and 8 requests: a batch a stage, as scheduled;
and all requests in one batch, one in flight. Shares are measured from the ranks' spans.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import command_line
import record
from rich.console import Console
from rich.table import Table

from bireme import LLM, SamplingParams
from bireme.engine.engine import Engine
from bireme.engine.pool import WorkerPool
from bireme.engine.scheduler import Scheduler
from bireme.observe.causes import Row
from bireme.observe.ledger import make_ledger
from bireme.trace import SpanKind

NUM_STAGES = 4
REQUESTS = [4, 8]
MODES = ["a batch a stage", "one batch in flight"]
SLOW = """
import time
from bireme.models.blocks import StageModel

forward = StageModel.forward

def slow_forward(self, x, step):
    time.sleep({seconds} * len(x))
    return forward(self, x, step)

StageModel.forward = slow_forward
"""


@contextmanager
def slowed_pool(seconds: float) -> Iterator[WorkerPool]:
    """Processes that run `SLOW` before the worker is imported."""
    with tempfile.TemporaryDirectory() as folder, WorkerPool() as pool:
        (Path(folder) / "sitecustomize.py").write_text(SLOW.format(seconds=seconds))
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = folder + (os.pathsep + before if before else "")
        yield pool


def use(engine: Engine, llm: LLM, mode: str) -> None:
    limits = replace(engine.scheduler.limits, pp_size=NUM_STAGES if mode == MODES[0] else 1)
    scheduler = Scheduler(limits, llm.plan.kinds)
    scheduler._next_step_id = engine.scheduler._next_step_id
    if mode == MODES[1]:
        scheduler.max_in_flight = 1
    engine.scheduler = scheduler


def measure(llm: LLM, mode: str, num_requests: int, num_tokens: int) -> tuple[float, list[float]]:
    """Tokens a second, and the share of each stage."""
    engine = llm.start()
    use(engine, llm, mode)
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    prompts = [[5 + index] for index in range(num_requests)]
    first, start = engine.scheduler._next_step_id, time.perf_counter()
    llm.generate(prompts, params)
    rate = num_requests * num_tokens / (time.perf_counter() - start)
    margin = NUM_STAGES + 1 if mode == MODES[0] else 1  # prompts come, and requests end
    last = engine.scheduler._next_step_id - 1
    spans, *_ = llm.spans().values()
    ends = {span.step_id: span.end_ns for span in spans if span.kind is SpanKind.STEP}
    found = make_ledger(llm.recorded(), ends[first + 2 * margin], ends[last - margin])
    return rate, [rank.share(Row.TOKEN_DEPENDENCY) for rank in found.ranks]


def main() -> None:
    parser = command_line.parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=10)
    parser.add_argument("--token-ms", type=float, default=60.0)
    arguments = parser.parse_args()
    rates: dict[str, list[float]] = {}
    shares: dict[str, list[list[float]]] = {}
    with (
        slowed_pool(arguments.token_ms / 1e3) as pool,
        LLM("demo", pipeline_parallel_size=NUM_STAGES, pool=pool) as llm,
    ):
        for round_ in range(arguments.rounds + 1):  # the first warms up and is not counted
            for num_requests in REQUESTS:
                for mode in MODES:
                    rate, found = measure(llm, mode, num_requests, arguments.tokens)
                    if round_:
                        name = f"{num_requests} requests, {mode}"
                        rates.setdefault(name, []).append(rate)
                        shares.setdefault(name, []).append(found)
    table = Table("", "tokens/s", *(f"stage {stage}" for stage in range(NUM_STAGES)))
    for name in rates:
        medians = [statistics.median(stage) for stage in zip(*shares[name], strict=True)]
        table.add_row(
            name, f"{statistics.median(rates[name]):.1f}", *(f"{share:.1%}" for share in medians)
        )
    Console(width=100).print(table)
    result = {"token_ms": arguments.token_ms, "tokens_per_s": rates, "shares": shares}
    record.write("token-dependency", ["bireme", "torch"], result)


if __name__ == "__main__":
    main()
