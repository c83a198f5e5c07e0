"""What it costs the driver to tell all ranks a decode step of 256 requests, and when the slowest knows.

    python benchmarks/step_messages.py [--messages 400]

Over the ring in shared memory (compiled helper, and from Python), over ZeroMQ, and over one socket
pair a rank. Steps are 2 ms apart, and 100 ms for what follows idleness. Medians, in microseconds:
encoding, encoding and sending, and from before the encoding until the slowest rank has the message.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import command_line
import msgspec
import record
from rich.console import Console
from rich.table import Table

from bireme.engine.channel import QueueSteps, RingSteps, Steps, open_channel, open_source
from bireme.engine.messages import Command, CommandReader, Execute, encode, frame
from bireme.parallel.broadcast import RingPlan
from bireme.parallel.counters import create_memory
from bireme.request import ScheduledBatch, ScheduledPiece

TRANSPORTS = ("ring", "ring from Python", "ZeroMQ", "socket pairs")
WORLDS = (2, 4)
NUM_REQUESTS = 256
GAP_S, IDLE_S = 0.002, 0.1
IDLE_SHARE = 10  # one message in so many follows idleness

Send = Callable[[Command], None]


def step(step_id: int) -> Execute:
    """One decode token of each request; one in 16 needs a new block."""
    pieces = [
        ScheduledPiece(slot, 1000 + slot, 1, None, [[slot]] if slot % 16 == 0 else [], True)
        for slot in range(NUM_REQUESTS)
    ]
    return Execute(ScheduledBatch(0, step_id, [], pieces))


def listen(steps: str, rank: int, num_messages: int) -> list[int]:
    """When each message was here: nanoseconds of the clock that all processes share."""
    if steps.isdigit():
        sock = socket.socket(fileno=int(steps))
        reader = CommandReader(sock)
        print("ready", flush=True)
        return [(reader.next(), time.monotonic_ns())[1] for _ in range(num_messages)]
    source = open_source(msgspec.json.decode(steps, type=Steps), rank)
    print("ready", flush=True)
    return [(source.receive(), time.monotonic_ns())[1] for _ in range(num_messages)]


def start(steps: str, rank: int, num_messages: int) -> subprocess.Popen[str]:
    given = ["--steps", steps, "--rank", str(rank), "--messages", str(num_messages)]
    fds = (int(steps),) if steps.isdigit() else ()
    return subprocess.Popen(
        [sys.executable, __file__, *given], stdout=subprocess.PIPE, text=True, pass_fds=fds
    )


@contextmanager
def world(
    transport: str, size: int, num_messages: int
) -> Iterator[tuple[Send, list[subprocess.Popen[str]]]]:
    """How to send to all ranks, and their processes."""
    if transport == "socket pairs":
        pairs = [socket.socketpair() for _ in range(size)]

        def send_each(command: Command) -> None:
            data = frame(command)
            for ours, _ in pairs:
                ours.sendall(data)

        yield (
            send_each,
            [
                start(str(theirs.fileno()), rank, num_messages)
                for rank, (_, theirs) in enumerate(pairs)
            ],
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        plan = RingPlan(num_readers=size, is_compiled=transport == "ring")
        fd, path = create_memory(plan.num_bytes, "steps")
        endpoints = tuple(f"ipc://{folder}/{rank}" for rank in range(size))
        steps = QueueSteps(endpoints) if transport == "ZeroMQ" else RingSteps(path, plan)
        channel, given = open_channel(steps), msgspec.json.encode(steps).decode()
        yield (
            lambda command: channel.send(encode(command), lambda rank: None),
            [start(given, rank, num_messages) for rank in range(size)],
        )
        channel.close()
        os.close(fd)


def measure(transport: str, size: int, num_messages: int) -> dict[str, float]:
    with world(transport, size, num_messages) as (send, ranks):
        for rank in ranks:
            assert rank.stdout is not None
            rank.stdout.readline()
        begun, sent = [], []
        for number in range(num_messages):
            command = step(number)
            time.sleep(IDLE_S if number % IDLE_SHARE == 0 else GAP_S)
            begun.append(time.monotonic_ns())
            send(command)
            sent.append(time.monotonic_ns())
        arrived = [json.loads(rank.communicate()[0]) for rank in ranks]
    slowest = [max(times) for times in zip(*arrived, strict=True)]
    delays = [(there - start) / 1000 for start, there in zip(begun, slowest, strict=True)]
    costs = [(done - start) / 1000 for start, done in zip(begun, sent, strict=True)]
    return {
        "send": statistics.median(costs),
        "slowest": statistics.median(delay for at, delay in enumerate(delays) if at % IDLE_SHARE),
        "slowest_after_idleness": statistics.median(delays[::IDLE_SHARE]),
    }


def encoding_us() -> float:
    taken, command = [], step(1)
    for _ in range(1000):
        start = time.perf_counter_ns()
        encode(command)
        taken.append((time.perf_counter_ns() - start) / 1000)
    return statistics.median(taken)


def main() -> None:
    parser = command_line.parser_of(__doc__)
    parser.add_argument("--messages", type=int, default=400)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--steps", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        print(json.dumps(listen(given.steps, given.rank, given.messages)))
        return
    found = {
        f"{transport}, {size} ranks": measure(transport, size, given.messages)
        for size in WORLDS
        for transport in TRANSPORTS
    }
    encoding = encoding_us()
    title = f"{len(encode(step(1))):,} bytes, encoded in {encoding:.0f} us"
    table = Table("", "encode and send, us", "slowest has it, us", "after 100 ms, us", title=title)
    for name, values in found.items():
        table.add_row(name, *(f"{value:.0f}" for value in values.values()))
    Console().print(table)
    kept = {
        name: {key: round(value, 1) for key, value in values.items()}
        for name, values in found.items()
    }
    record.write(
        "step-messages", ["bireme", "msgspec", "pyzmq"],
        {"num_requests": NUM_REQUESTS, "encode_us": round(encoding, 1), "median_us": kept},
    )  # fmt: skip


if __name__ == "__main__":
    main()
