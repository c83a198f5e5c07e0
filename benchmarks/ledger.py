"""What the bubble ledger costs: spans that are written, and a running server that is asked for it.

    python benchmarks/ledger.py [--rounds 80] [--seconds 1]

`bireme serve demo -pp 2` answers a closed loop of 8 requests for about two seconds, in turn: without spans (which
nobody can ask for: they are patched away here), with them, as always, and while its ledger of the last second is asked
for every second. Each round has an order of its own; a cost is the mean of the rounds' own ratios, with its standard
error, for one turn varies by several percent.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import command_line
import record

from bireme.bench.client import Client, Target
from bireme.bench.load import Load, Progress
from bireme.bench.queries import MadeUp, RandomQueries
from bireme.bench.sender import Sender
from bireme.bench.serving_metrics import Wanted, summarise

QUERIES = RandomQueries(made_up=MadeUp(), num_prompts=40, input_len=16, output_len=64)
MODES = ["without spans", "alone", "asked for its ledger"]
WITHOUT_SPANS = """
from contextlib import nullcontext
from bireme.trace import SpanRing

NOTHING = nullcontext()
SpanRing.span = SpanRing.aside = lambda self, kind, num_bytes=0, step_id=None: NOTHING
"""


@contextmanager
def serving(first_on_path: Path | None = None) -> Iterator[str]:
    """Its address. Modules of a folder are imported before others."""
    path = [str(first_on_path), os.environ.get("PYTHONPATH", "")] if first_on_path else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)} if path else None
    command = [sys.executable, "-P", "-m", "bireme", "serve", "demo", "-pp", "2", "--port", "0"]
    with subprocess.Popen(
        [*command, "--no-log-requests"], stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        assert server.stderr is not None
        told = (re.match(r"serving .* at (http://\S+)/v1", line) for line in server.stderr)
        yield next(found[1] for found in told if found)
        server.terminate()


@contextmanager
def asking(url: str, seconds: float) -> Iterator[None]:
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.wait(seconds):
            urllib.request.urlopen(f"{url}/debug/ledger?seconds={seconds}").read()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


async def tokens_per_s(url: str) -> float:
    async with Client(Target(base_url=url, extra_body={"ignore_eos": True})) as client:
        await client.find_model()
        sender = Sender(client, QUERIES, Progress())
        load = Load(sender.prepare, len(QUERIES), Progress())
        result = await load.run(None, 8, asyncio.Event())
    return float(summarise(result, Wanted())["output_throughput"])


def main() -> None:
    parser = command_line.parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=80)
    parser.add_argument("--seconds", type=float, default=1.0)
    arguments = parser.parse_args()
    rates: dict[str, list[float]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sitecustomize.py").write_text(WITHOUT_SPANS)
        with serving(Path(folder)) as without, serving() as url:
            turns = random.Random(0)
            for one in (without, url):
                asyncio.run(tokens_per_s(one))  # warms up
            for _ in range(arguments.rounds):
                for mode in turns.sample(MODES, len(MODES)):
                    beside = asking(url, arguments.seconds) if mode == MODES[2] else nullcontext()
                    with beside:
                        rate = asyncio.run(tokens_per_s(without if mode == MODES[0] else url))
                    rates[mode].append(rate)
    for mode, found in rates.items():
        print(f"{mode:24} {statistics.median(found):8.1f} tokens/s")
    costs = {mode: cost(rates[mode], rates[MODES[0]]) for mode in MODES[1:]}
    for mode, (mean, error) in costs.items():
        print(f"{mode} costs {mean:.2%} ± {error:.2%} of {MODES[0]}")
    record.write(
        "ledger", ["bireme", "torch"],
        {"tokens_per_s": rates, "every_s": arguments.seconds, "cost_and_standard_error": costs},
    )  # fmt: skip


def cost(rates: list[float], before: list[float]) -> tuple[float, float]:
    """Share of throughput that is lost, and its standard error."""
    shares = [1 - rate / one for rate, one in zip(rates, before, strict=True)]
    return statistics.mean(shares), statistics.stdev(shares) / len(shares) ** 0.5


if __name__ == "__main__":
    main()
