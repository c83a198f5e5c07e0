"""What a rank notes of each step while it is asked to: every layer's time by the device's clock, or what
torch.profiler sees. Hooks slow a step down, so this is for steps after those that are measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from bireme.engine.messages import LayerSeen, OperatorSeen
from bireme.models.blocks import StageModel
from bireme.request import ScheduledBatch

NUM_OPERATORS = 30  # that take most of a rank's time


class _Clock(Protocol):
    """Marks times; what lies between two is known once `seconds` is asked."""

    def mark(self) -> Any: ...

    def seconds(self, start: Any, end: Any) -> float: ...


class _HostClock:
    mark = staticmethod(time.perf_counter_ns)

    def seconds(self, start: int, end: int) -> float:
        return (end - start) / 1e9


class _DeviceClock:
    """Of the stream, after all that was issued before."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


class LayerTimes:
    """Hooks around every layer of a stage, and around its embedding and head."""

    def __init__(self, model: StageModel, device: torch.device) -> None:
        self._clock: _Clock = _DeviceClock() if device.type == "cuda" else _HostClock()
        self._begun: dict[str, Any] = {}
        self._steps: list[tuple[bool, list[tuple[str, Any, Any]]]] = []
        self._handles: list[RemovableHandle] = []
        for name, module in _parts(model):
            self._handles += [
                module.register_forward_pre_hook(self._begin(name)),
                module.register_forward_hook(self._end(name)),
            ]

    def begin_step(self, batch: ScheduledBatch) -> None:
        self._steps.append((batch.is_decode, []))

    def finish(self) -> list[LayerSeen]:
        """Takes the hooks away; what was seen, a part's calls in a step added up."""
        for handle in self._handles:
            handle.remove()
        found: dict[tuple[str, bool], list[float]] = {}
        for is_decode, marks in self._steps:
            taken: dict[str, float] = {}
            for name, start, end in marks:
                taken[name] = taken.get(name, 0.0) + self._clock.seconds(start, end)
            for name, seconds in taken.items():
                found.setdefault((name, is_decode), []).append(seconds)
        return [
            LayerSeen(name, is_decode, len(times), sum(times), median(times))
            for (name, is_decode), times in found.items()
        ]

    def _begin(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(_module: nn.Module, _inputs: Any) -> None:
            self._begun[name] = self._clock.mark()

        return hook

    def _end(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            if self._steps:
                self._steps[-1][1].append((name, self._begun[name], self._clock.mark()))

        return hook


def _parts(model: StageModel) -> Iterator[tuple[str, nn.Module]]:
    if model.embedding is not None:
        yield "embedding", model.embedding
    yield from model.layers.items()
    if model.head is not None:
        yield "head", model.head


class KernelTrace:
    """torch.profiler, from here on; its trace goes to a file."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self._path, self._is_cuda = path, device.type == "cuda"
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it tells that it starts and stops
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._is_cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()

    def finish(self) -> list[OperatorSeen]:
        """What took most: operators, those inside them apart, or on a GPU the kernels, in graphs as elsewhere."""
        self._profiler.stop()
        self._profiler.export_chrome_trace(str(self._path))
        wanted = "CUDA" if self._is_cuda else "CPU"
        events = [it for it in self._profiler.key_averages() if it.device_type.name == wanted]
        found = [self._operator(event) for event in events]
        found.sort(key=lambda one: -one.self_s)
        return [one for one in found[:NUM_OPERATORS] if one.self_s > 0]

    def _operator(self, event: Any) -> OperatorSeen:
        own, whole = event.self_cpu_time_total, event.cpu_time_total
        if self._is_cuda:
            own = whole = event.self_device_time_total
        return OperatorSeen(event.key, event.count, own / 1e6, whole / 1e6)


class RankProfile:
    """One or the other, as it was asked for."""

    def __init__(self, model: StageModel, device: torch.device, kernels: Path | None) -> None:
        self._layers = LayerTimes(model, device) if kernels is None else None
        self._kernels = KernelTrace(kernels, device) if kernels is not None else None

    def begin_step(self, batch: ScheduledBatch) -> None:
        if self._layers is not None:
            self._layers.begin_step(batch)

    def finish(self) -> tuple[list[LayerSeen], list[OperatorSeen]]:
        """What was seen."""
        layers = self._layers.finish() if self._layers is not None else []
        operators = self._kernels.finish() if self._kernels is not None else []
        return layers, operators
