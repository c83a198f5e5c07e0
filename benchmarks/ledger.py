"""What the bubble ledger costs: spans that are written, and a running server that is asked for it.

    python benchmarks/ledger.py [--rounds 5] [--seconds 1]

`bireme serve demo -pp 2` answers a closed loop of 8 requests, in turn: without spans (which nobody can ask for: they
are patched away here), with them, as always, and while its ledger of the last second is asked for every second.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import record

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
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sitecustomize.py").write_text(WITHOUT_SPANS)
        with serving(Path(folder)) as without, serving() as url:
            for one in (without, url):
                tokens_per_s(one)  # warms up
            for _ in range(arguments.rounds):
                rates[MODES[0]].append(tokens_per_s(without))
                rates[MODES[1]].append(tokens_per_s(url))
                with asking(url, arguments.seconds):
                    rates[MODES[2]].append(tokens_per_s(url))
    medians = {mode: statistics.median(found) for mode, found in rates.items()}
    for mode, median in medians.items():
        print(f"{mode:24} {median:8.1f} tokens/s")
    for mode, before in ((MODES[1], MODES[0]), (MODES[2], MODES[1])):
        print(f"{mode} costs {1 - medians[mode] / medians[before]:.2%} of {before}")
    record.write(
        "ledger", ["bireme", "torch"], {"tokens_per_s": rates, "every_s": arguments.seconds}
    )


if __name__ == "__main__":
    main()
