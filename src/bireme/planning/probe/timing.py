"""How long calls take: by the device's own events on CUDA, else by the host's clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Repeat:
    """`run` makes `num_calls` calls. `is_on_host`: what counts is how soon the host goes on."""

    run: Call
    num_calls: int = 1
    is_on_host: bool = False


def repeated(call: Call, num_calls: int, *, is_on_host: bool = False) -> Repeat:
    def run() -> None:
        for _ in range(num_calls):
            call()

    return Repeat(run, num_calls, is_on_host)


def captured(call: Call, num_calls: int) -> Repeat:
    """On CUDA, `num_calls` calls as one graph: no launch holds the device up."""
    call()  # before capture: libraries allocate at the first call
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    # NCCL's own thread may query; torch's own stream would be of the device that was captured on first
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(num_calls):
            call()
    return Repeat(graph.replay, num_calls)


def time_repeats(repeat: Repeat, num_repeats: int, device: torch.device) -> list[float]:
    """Seconds of a call, of each repeat."""
    if device.type != "cuda":
        taken = [_host_s(repeat) for _ in range(num_repeats)]
    elif repeat.is_on_host:
        taken = []
        for _ in range(num_repeats):
            torch.cuda.synchronize()  # a full queue would hold the host up
            taken.append(_host_s(repeat))
    else:
        taken = _device_s(repeat, num_repeats)
    return [seconds / repeat.num_calls for seconds in taken]


def _host_s(repeat: Repeat) -> float:
    start_ns = time.perf_counter_ns()
    repeat.run()
    return (time.perf_counter_ns() - start_ns) / 1e9


def _device_s(repeat: Repeat, num_repeats: int) -> list[float]:
    events = [(_event(), _event()) for _ in range(num_repeats)]
    for start, end in events:
        start.record()
        repeat.run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
