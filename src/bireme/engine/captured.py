"""What a function launches, captured in a CUDA graph that one launch runs again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch

from bireme.kernels.device_spans import CapturedSpans, DeviceSpans

_MOST_NOTED = 4  # collectives of a graph that stamps of them beside it hold up little


@contextmanager
def nothing_collected() -> Iterator[None]:
    """While a stream is captured nothing may be given back to the device, as the end of an earlier model's parts
    would, whenever a collection comes upon them. So what can be is given back before, and after."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class CapturedGraph:
    """What a function made when it was captured is made anew at every replay, in the same memory. `noting`: the same
    with stamps of all collectives, where this one has none of many."""

    graph: torch.cuda.CUDAGraph
    made: torch.Tensor
    spans: CapturedSpans
    noting: CapturedGraph | None = None

    def replay(self, spans: DeviceSpans) -> torch.Tensor:
        if self.noting is not None and spans.is_sampled_step:
            return self.made.copy_(self.noting.replay(spans))
        self.graph.replay()
        spans.replayed(self.spans)
        return self.made

    def close(self) -> None:
        """Before the groups are left that its collectives are of: NCCL would wait for it."""
        self.graph.reset()
        if self.noting is not None:
            self.noting.close()


class GraphCapturer:
    """Captures the graphs of one rank, which share their memory: they run one after another."""

    def __init__(self, spans: DeviceSpans, device: torch.device) -> None:
        self.spans, self._device = spans, device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def capture(
        self, function: Callable[[], torch.Tensor], *, notes_begin: bool = False
    ) -> CapturedGraph:
        """Within `nothing_collected`; what `function` waits for on the host cannot be captured."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            function()  # kernels are compiled and libraries make their plans, which cannot be captured
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        noting = self._capture(function, notes_others=True, notes_begin=notes_begin)
        if noting.spans.num_others <= _MOST_NOTED:
            return noting
        plain = self._capture(function, notes_others=False, notes_begin=notes_begin)
        return replace(plain, noting=noting)

    def _capture(
        self, function: Callable[[], torch.Tensor], *, notes_others: bool, notes_begin: bool
    ) -> CapturedGraph:
        """Without what `torch.cuda.graph` does each time: its stream is the first device's, and it gives all cached
        memory back."""
        graph = torch.cuda.CUDAGraph()
        with (
            self.spans.capturing(notes_others=notes_others, notes_begin=notes_begin) as spans,
            torch.cuda.stream(self._stream),
        ):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                if notes_begin:
                    self.spans.note_begin()
                made = function()
            except BaseException:
                with suppress(RuntimeError):  # the capture is void: the first error tells why
                    graph.capture_end()
                raise
            graph.capture_end()
        return CapturedGraph(graph, made, spans)
