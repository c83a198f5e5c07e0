"""Latency of an all-reduce between two pinned ranks: shared memory, with the compiled helper and from
Python, beside gloo, in one run.

    python benchmarks/all_reduce.py [--seconds 2]

Rank r is pinned to core r, with one thread. Float32 sums; medians in microseconds, in turn three
times for each transport, the best of the three.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import command_line
import record
import torch
from rich.console import Console
from rich.table import Table

from bireme.parallel.collectives import join
from bireme.parallel.segment_plan import SegmentPlan, create_segment
from bireme.trace import SpanRing

SIZES = (2 << 10, 16 << 10, 128 << 10, 1 << 20, 8 << 20)  # bytes
TRANSPORTS = ("gloo", "shared memory", "shared memory from Python")


def plan(transport: str) -> SegmentPlan:
    return SegmentPlan(
        widths=(2,), hidden_bytes=1, sampled_bytes=1, is_compiled=transport == "shared memory"
    )


def measure(
    rank: int, transport: str, store: str, segment: str, seconds: float
) -> dict[int, float]:
    """Median microseconds of each size, as one rank sees it."""
    os.sched_setaffinity(0, {rank})
    torch.set_num_threads(1)
    comm = join(
        (2,), rank, Path(store), torch.device("cpu"), 60.0, SpanRing.create(1024),
        (segment, plan(transport)) if segment else None,
    )  # fmt: skip
    group = comm.mesh.tensor
    found = {}
    for size in SIZES:
        x, taken = torch.zeros(size // 4), []
        # both ranks make the same number of sums: it follows from the size alone
        for _ in range(int(seconds * 1e9 / (len(SIZES) * (2e5 + size)))):
            start = time.perf_counter_ns()
            group.all_reduce(x)
            taken.append((time.perf_counter_ns() - start) / 1000)
        found[size] = statistics.median(taken)
    comm.leave()
    return found


def run_pair(transport: str, seconds: float) -> dict[int, float]:
    """Medians of rank 0, of two processes that meet and measure."""
    with tempfile.TemporaryDirectory() as folder:
        fd, path = create_segment(plan(transport))
        command = [
            sys.executable,
            __file__,
            "--seconds",
            str(seconds),
            "--store",
            f"{folder}/store",
            "--transport",
            transport,
        ]
        command += ["--segment", path] if transport != "gloo" else []
        ranks = [
            subprocess.Popen(
                [*command, "--rank", str(rank)], stdout=subprocess.PIPE, text=True,
                env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
            )
            for rank in range(2)
        ]  # fmt: skip
        first, second = (rank.communicate()[0] for rank in ranks)
        os.close(fd)
    if any(rank.returncode for rank in ranks):
        sys.exit(f"a rank failed over {transport}: {first}{second}")
    return {int(size): value for size, value in json.loads(first).items()}


def main() -> None:
    parser = command_line.parser_of(__doc__)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--transport", help=argparse.SUPPRESS)
    parser.add_argument("--segment", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        print(
            json.dumps(
                measure(given.rank, given.transport, given.store, given.segment, given.seconds)
            )
        )
        return
    runs = {name: [] for name in TRANSPORTS}  # type: dict[str, list[dict[int, float]]]
    for _ in range(3):
        for name in TRANSPORTS:
            runs[name].append(run_pair(name, given.seconds))
    best = {name: {n: min(run[n] for run in runs[name]) for n in SIZES} for name in TRANSPORTS}
    table = Table("bytes", *(f"{name}, us" for name in TRANSPORTS), "times faster")
    for size in SIZES:
        taken = [best[name][size] for name in TRANSPORTS]
        table.add_row(f"{size:,}", *(f"{us:.1f}" for us in taken), f"{taken[0] / taken[1]:.1f}")
    Console().print(table)
    kept = {
        name: {str(size): round(value, 2) for size, value in best[name].items()} for name in best
    }
    record.write("all-reduce", ["torch", "bireme"], {"median_us": kept})


if __name__ == "__main__":
    main()
