"""What viewers of the live page cost a busy server: CPU time of its processes, by process.

    python benchmarks/live_page.py [--rounds 4] [--seconds 20]

`bireme serve demo -tp 2 -pp 2` answers a closed loop of 4 streams throughout. In turn, each for some seconds: nobody
looks; `/debug/ledger?seconds=1` is asked for once a second, as a scrape of `/metrics` has it; three viewers read
`/debug/live` (sockets that take what comes, on this machine; no browser runs). User and system time of the front end,
of the process that makes ledgers and of the engine, from /proc, as milliseconds a second: 10 are 1 % of a core.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import command_line
import record

MODES = ("nobody", "ledger each second", "three viewers")
NUM_VIEWERS = 3
NUM_STREAMS = 4
TICKS = os.sysconf("SC_CLK_TCK")


@contextmanager
def serving() -> Iterator[tuple[int, str]]:
    """The process and its address."""
    command = [sys.executable, "-P", "-m", "bireme", "serve", "demo", "-tp", "2", "-pp", "2"]
    with subprocess.Popen(
        [*command, "--port", "0", "--no-log-requests"], stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stderr is not None
        told = (re.match(r"serving .* at (http://\S+)/v1", line) for line in server.stderr)
        url = next(found[1] for found in told if found)
        yield server.pid, url
        server.terminate()


def children(pid: int) -> dict[int, str]:
    """And what they run."""
    found: dict[int, str] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found[int(child)] = Path(f"/proc/{child}/cmdline").read_bytes().decode()
    return found


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def used_s(server: int) -> dict[str, float]:
    used = {"front end": cpu_s(server), "recorder": 0.0, "engine": 0.0}
    for pid, command in children(server).items():
        name = "recorder" if "recorder" in command else "engine"
        used[name] += cpu_s(pid)
    return used


@contextmanager
def again_and_again(work: Callable[[], object], every_s: float = 0.0) -> Iterator[None]:
    """On a schedule, as the producer of the page is."""
    is_over = threading.Event()

    def run() -> None:
        due_s = time.monotonic()
        while not is_over.wait(max(0.0, due_s - time.monotonic())):
            due_s = time.monotonic() + every_s
            work()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def complete(url: str) -> int:
    body = {"prompt": "import ", "max_tokens": 200, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return sum(1 for _ in response)


@contextmanager
def viewing(url: str, sizes: list[int]) -> Iterator[None]:
    """`sizes` gets the bytes of each event."""
    response = urllib.request.urlopen(f"{url}/debug/live")
    is_over = threading.Event()

    def read() -> None:
        for line in response:
            if line.startswith(b"data: "):
                sizes.append(len(line))
            if is_over.is_set():
                return

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        response.close()


def measure(server: int, url: str, mode: str, seconds: float) -> tuple[dict[str, float], list[int]]:
    """Milliseconds a second by process, once the mode has gone on for two seconds."""
    sizes: list[int] = []
    with ExitStack() as stack:
        if mode == MODES[1]:
            ask = f"{url}/debug/ledger?seconds=1&columns=1"
            stack.enter_context(again_and_again(lambda: urllib.request.urlopen(ask).read(), 1.0))
        for _ in range(NUM_VIEWERS if mode == MODES[2] else 0):
            stack.enter_context(viewing(url, sizes))
        threading.Event().wait(2.0)
        del sizes[:]
        before, begun = used_s(server), time.monotonic()
        threading.Event().wait(seconds)
        after, took = used_s(server), time.monotonic() - begun
    return {name: 1e3 * (after[name] - before[name]) / took for name in after}, sizes


def main() -> None:
    parser = command_line.parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--idle", action="store_true", help="Without streams.")
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    events: list[int] = []
    with serving() as (server, url), ExitStack() as load:
        for _ in range(0 if arguments.idle else NUM_STREAMS):
            load.enter_context(again_and_again(lambda: complete(url)))
        urllib.request.urlopen(f"{url}/debug/ledger").read()  # starts the recorder
        for _ in range(arguments.rounds):
            for mode in MODES:
                used, sizes = measure(server, url, mode, arguments.seconds)
                found[mode].append(used)
                events += sizes
    medians = {
        mode: {name: statistics.median(it[name] for it in its) for name in its[0]}
        for mode, its in found.items()
    }
    for mode, used in medians.items():
        print(f"{mode:20} " + "  ".join(f"{name} {ms:6.1f} ms/s" for name, ms in used.items()))
    for name in ("front end", "recorder"):
        more = medians[MODES[2]][name] - medians[MODES[1]][name]
        print(f"three viewers beyond the ledger, {name}: {more / 10:.2f} % of a core")
    events_per_s = len(events) / (NUM_VIEWERS * arguments.rounds * arguments.seconds)
    print(f"{events_per_s:.2f} events/s of {statistics.median(events) / 1e3:.1f} kB")
    record.write(
        "live-page" + ("-idle" if arguments.idle else ""),
        ["bireme", "torch"],
        {
            "cpu_ms_per_s": found,
            "medians": medians,
            "events_per_s": events_per_s,
            "median_event_bytes": statistics.median(events),
        },
    )


if __name__ == "__main__":
    main()
