"""The ledger of decode steps that are CUDA graphs beside what torch.profiler saw of them, and what spans cost.

    python benchmarks/ledger_gpu.py --name 2x-h200 [--model llama-2-7b] [--layouts 2,1 1,1 1,2] [--batches 8,64]

Shares of a rank's time, of prompts of 8 tokens continued by 192, medians of three rounds. The ledger: collectives,
work, and the rest, in which the GPU has none, with what of it is `host`; the same of steps that no profiler sees, from
a third of 384 tokens on. The profiler: kernels in which a tensor group's ranks wait for one another, other kernels with
what lies between those that were launched together, however long (a GPU may stop amid a graph while it is traced, of
which the ledger knows nothing), and pauses with the kernels in which stages wait for one another. Then the mean time
from token to token of the first layout and batch with spans and without (nobody can ask for that: they are patched away
here), in turn, each in processes of its own.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import command_line
import record
from decode_gpu import settings
from gpu_floors import numbers

from bireme import LLM
from bireme.bench.answer_times import Latencies
from bireme.bench.throughput import measure_throughput
from bireme.bench.workload import Workload
from bireme.observe.causes import Row
from bireme.observe.kernel_trace import kernel_times
from bireme.observe.ledger import RankLedger, make_ledger
from bireme.observe.window import whole_since

INPUT_LEN, NUM_TOKENS, ROUNDS = 8, 192, 4
PROFILED_ROUNDS = 3
STEADY_TOKENS = 384
SHARES = ("collective", "work", "rest")
Shares = dict[str, float]
WITHOUT_SPANS = """
from contextlib import nullcontext
from bireme.kernels.device_spans import DeviceSpans
from bireme.trace import SpanRing

NOTHING = nullcontext()
for spans in (SpanRing, DeviceSpans):
    spans.span = spans.aside = spans.stamped = lambda self, kind, num_bytes=0, step_id=None: NOTHING
DeviceSpans.span_since_graph = lambda self, kind: NOTHING
DeviceSpans.note_begin = lambda self: None
"""


def shares_by_ledger(rank: RankLedger) -> Shares:
    collective = rank.share(Row.COLLECTIVE_MOVE) + rank.share(Row.COLLECTIVE_WAIT)
    work = rank.share(Row.COMPUTE)
    rest = 1 - collective - work
    return {"collective": collective, "work": work, "rest": rest, "host": rank.share(Row.HOST)}


def shares_by_profiler(path: Path) -> Shares:
    found = kernel_times(path)
    assert found is not None, path
    return {
        "collective": found.collective_s / found.whole_s,
        "work": (found.other_s + found.between_s) / found.whole_s,
        "rest": (found.pause_s + found.message_s) / found.whole_s,
        "messages": found.message_s / found.whole_s,
        "between kernels": found.between_s / found.whole_s,
        "longest between kernels": found.longest_between_s / found.whole_s,
        "longest pause": found.longest_pause_s / found.whole_s,
    }


def gaps_s(llm: LLM, batch: int, seed: int, num_tokens: int = NUM_TOKENS) -> list[float]:
    seen = Latencies()
    load = Workload(num_prompts=batch, input_len=INPUT_LEN, output_len=num_tokens, seed=seed)
    measure_throughput(llm, load, seen=seen.note)
    return seen.gaps_s


def profiled(llm: LLM, batch: int, seed: int, path: str, num_tokens: int) -> list[RankLedger]:
    """Of each rank, while the profiler writes a trace to `path`, with `{rank}` in it."""
    llm.executor.begin_profile(Path(path))
    start_ns = time.monotonic_ns()
    gaps_s(llm, batch, seed, num_tokens)
    llm.executor.usage()  # all spans are written by then
    llm.executor.end_profile()
    recorded, is_whole = whole_since(llm.recorded(), start_ns)
    assert is_whole, f"the rings hold less than {num_tokens} tokens of {batch} requests"
    return list(make_ledger(recorded).ranks)


def of_steady_steps(llm: LLM, batch: int) -> list[RankLedger]:
    """Of each rank without a profiler, from a third of the tokens on: when all decode."""
    start_ns = time.monotonic_ns()
    gaps_s(llm, batch, 1, STEADY_TOKENS)
    begun_ns = start_ns + (time.monotonic_ns() - start_ns) // 3
    llm.executor.usage()  # all spans are written by then
    steady, _ = whole_since(llm.recorded(), begun_ns)  # or as far back as the rings tell
    return list(make_ledger(steady).ranks)


def medians(rounds: list[Shares]) -> Shares:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def beside_profiler(llm: LLM, batch: int, folder: Path) -> list[dict[str, Any]]:
    """Of each rank."""
    gaps_s(llm, batch, 0, 8)
    steady = {rank.name: shares_by_ledger(rank) for rank in of_steady_steps(llm, batch)}
    path = str(folder / f"{batch}-rank-{{rank}}.json")
    profiled(llm, batch, 0, path, 8)  # the first profile of a process misses kernels
    rounds: dict[str, list[dict[str, Shares]]] = {}
    for seed in range(PROFILED_ROUNDS):
        for index, rank in enumerate(profiled(llm, batch, seed, path, NUM_TOKENS)):
            theirs = shares_by_profiler(Path(path.replace("{rank}", str(index))))
            both = {"ledger": shares_by_ledger(rank), "profiler": theirs}
            rounds.setdefault(rank.name, []).append(both)
    found = []
    for name, of_rank in rounds.items():
        ours, theirs = (medians([one[by] for one in of_rank]) for by in ("ledger", "profiler"))
        apart = max(abs(ours[share] - theirs[share]) for share in SHARES)
        found.append(
            {
                "rank": name, "batch": batch, "without profiler": steady[name],
                "ledger": ours, "profiler": theirs,
                "largest_difference": apart, "rounds": of_rank,
            }
        )  # fmt: skip
    return found


def step_s(model: str, layout: str, batch: int, *, has_spans: bool) -> float:
    """Of processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = [folder, os.environ.get("PYTHONPATH", "")]
        if not has_spans:
            (Path(folder) / "sitecustomize.py").write_text(WITHOUT_SPANS)
        command = [sys.executable, __file__, "--model", model, "--layouts", layout]
        command += ["--batches", str(batch), "--step"]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["num_spans"] > 0) == has_spans, "sitecustomize.py did not do what it should"
    return float(told["step_s"])


def tell_step(model: str, layout: str, batch: int) -> None:
    with LLM(**settings(model, layout)) as llm:
        gaps_s(llm, batch, seed=1)
        found = [statistics.mean(gaps_s(llm, batch, seed)) for seed in range(5)]
        num_spans = sum(map(len, llm.executor.spans().values()))
    print(json.dumps({"step_s": statistics.median(found), "num_spans": num_spans}))


def told(one: dict[str, Any]) -> str:
    ours, theirs, alone = one["ledger"], one["profiler"], one["without profiler"]
    shares = ", ".join(
        f"{name} {share:.1%}" + (f" ({theirs[name]:.1%})" if name in theirs else "")
        for name, share in ours.items()
    )
    return f"{shares}; without profiler host {alone['host']:.1%}"


def main() -> None:
    parser = command_line.shape_parser(__doc__, ["2,1", "1,1", "1,2"], "8,64")
    parser.add_argument("--step", action="store_true", help="only of the first layout and batch")
    asked = parser.parse_args()
    layout, batch = asked.layouts[0], numbers(asked.batches)[0]
    command_line.need_gpus(parser, layouts=[layout] if asked.step else asked.layouts)
    if asked.step:
        tell_step(asked.model, layout, batch)
        return
    found: dict[str, Any] = {}
    for its in asked.layouts:
        with (
            tempfile.TemporaryDirectory() as folder,
            LLM(**settings(asked.model, its)) as llm,
        ):
            ranks = [
                one
                for together in numbers(asked.batches)
                for one in beside_profiler(llm, together, Path(folder))
            ]
        found[its] = ranks
        for one in ranks:
            print(f"{its} batch {one['batch']} {one['rank']}: {told(one)}", flush=True)
    name = f"ledger-{Path(asked.model).name}-{asked.name}"
    record.write(name, ["torch", "triton"], {"shares": found})
    costs: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(ROUNDS):
        for has_spans, seconds in costs.items():
            seconds.append(step_s(asked.model, layout, batch, has_spans=has_spans))
    with_spans, without = (statistics.median(costs[it]) for it in (True, False))
    spread = {has: ", ".join(f"{1e3 * one:.3f}" for one in costs[has]) for has in costs}
    print(
        f"{layout} batch {batch}: {1e3 * with_spans:.3f} ms with spans ({spread[True]}), "
        f"{1e3 * without:.3f} without ({spread[False]})"
    )
    step_s_of = {"with spans": costs[True], "without": costs[False]}
    record.write(name, ["torch", "triton"], {"shares": found, "step_s": step_s_of})


if __name__ == "__main__":
    main()
