"""What it costs to ask a running server for its bubble ledger.

    python benchmarks/ledger.py [--rounds 5] [--seconds 1]

`bireme serve demo -pp 2` answers a closed loop of 8 requests, in turn alone and while its ledger of the last second
is asked for every second (as a Prometheus with an interval of 1 s does). Spans are written in both: they always are.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import record

MODES = ["alone", "asked for its ledger"]


@contextmanager
def serving() -> Iterator[str]:
    """Its address."""
    command = [sys.executable, "-P", "-m", "bireme", "serve", "demo", "-pp", "2", "--port", "0"]
    with subprocess.Popen(
        [*command, "--no-log-requests"], stderr=subprocess.PIPE, text=True
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


def tokens_per_s(url: str) -> float:
    command = [
        sys.executable, "-P", "-m", "bireme", "bench", "serve", "--base-url", url, "--json",
        "--max-concurrency", "8", "--num-prompts", "120", "--input-len", "16", "--output-len", "64",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["output_throughput"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    arguments = parser.parse_args()
    rates: dict[str, list[float]] = {mode: [] for mode in MODES}
    with serving() as url:
        tokens_per_s(url)  # warms up
        for _ in range(arguments.rounds):
            rates[MODES[0]].append(tokens_per_s(url))
            with asking(url, arguments.seconds):
                rates[MODES[1]].append(tokens_per_s(url))
    medians = {mode: statistics.median(found) for mode, found in rates.items()}
    for mode, median in medians.items():
        print(f"{mode:24} {median:8.1f} tokens/s")
    print(f"cost {1 - medians[MODES[1]] / medians[MODES[0]]:.2%}")
    record.write(
        "ledger", ["bireme", "torch"], {"tokens_per_s": rates, "every_s": arguments.seconds}
    )


if __name__ == "__main__":
    main()
