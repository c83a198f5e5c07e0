"""The work that a rank repeats, as inference does it: our products, collectives, links and reader."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count, cycle
from pathlib import Path

import numpy as np
import torch

from bireme.checkpoint.loader import torch_dtype
from bireme.checkpoint.reader import Checkpoint, bits_dtype
from bireme.errors import EngineError
from bireme.kernels.linear import can_be_packed, linear, pack
from bireme.parallel.boxes import full_box
from bireme.parallel.collectives import Communicator
from bireme.parallel.layout import Source
from bireme.planning.probe.messages import (
    ROW_BYTES,
    AllReduce,
    CopyMemory,
    Launch,
    Multiply,
    ReadMemory,
    ReadPageCache,
    Send,
    Work,
)
from bireme.planning.probe.timing import Call, Repeat, captured, repeated

_CACHES_BYTES = 256 << 20  # weights take turns, so many that no cache holds one until its next
_LAUNCHES = 100
_SMALL_BYTES = 1 << 20  # messages up to this are sent several at a time on CUDA
_SMALL_CALLS = 20


class Workshop:
    """Makes work for one rank; keeps the weights of one shape."""

    def __init__(self, comm: Communicator, device: torch.device) -> None:
        self._comm, self._device = comm, device
        self._weights: tuple[object, list[torch.Tensor]] = (None, [])

    def prepare(self, work: Work) -> Repeat:
        match work:
            case Multiply():
                return self._multiply(work)
            case ReadMemory(num_bytes):
                x = torch.ones(num_bytes // 4, device=self._device)
                return self._queued(x.sum, 1)
            case CopyMemory(num_bytes):
                x = torch.ones(num_bytes // 4, device=self._device)
                return self._queued(partial(torch.empty_like(x).copy_, x), 1)
            case Launch():
                one = torch.zeros(1, device=self._device)
                return repeated(partial(one.add_, 1), _LAUNCHES, is_on_host=True)
            case ReadPageCache(folder):
                return Repeat(_reader(Path(folder)), is_on_host=True)
            case AllReduce(num_bytes):
                num_rows = -(-num_bytes // ROW_BYTES)
                x = torch.zeros(num_rows, num_bytes // 4 // num_rows, device=self._device)
                call = partial(self._comm.mesh.tensor.all_reduce, x)
                return repeated(call, self._num_calls(num_bytes))
            case Send(num_bytes):
                both_ways = repeated(self._there_and_back(num_bytes), self._num_calls(num_bytes))
                return Repeat(both_ways.run, 2 * both_ways.num_calls)

    def _queued(self, call: Call, num_calls: int) -> Repeat:
        """On CUDA as a graph."""
        return captured(call, num_calls) if self._device.type == "cuda" else Repeat(call)

    def _num_calls(self, num_bytes: int) -> int:
        is_queued = self._device.type == "cuda" and num_bytes <= _SMALL_BYTES
        return _SMALL_CALLS if is_queued else 1

    def _multiply(self, work: Multiply) -> Repeat:
        weights = self._weights_of(work)
        x = torch.randn(work.num_tokens, work.in_features, device=self._device)
        x, turns = x.to(weights[0].dtype), cycle(weights)
        return self._queued(lambda: linear(x, next(turns)), len(weights))

    def _weights_of(self, work: Multiply) -> list[torch.Tensor]:
        shape = work.dtype, work.in_features, work.out_features
        if self._weights[0] != shape:
            self._weights = None, []  # gives the memory back before more is taken
            self._weights = shape, self._make_weights(work)
        return self._weights[1]

    def _make_weights(self, work: Multiply) -> list[torch.Tensor]:
        weight = torch.randn(work.out_features, work.in_features, device=self._device)
        weight = weight.to(torch_dtype(work.dtype))
        copies = max(1, _CACHES_BYTES // weight.nbytes)
        make: Callable[[torch.Tensor], torch.Tensor] = (
            pack if can_be_packed(weight) else torch.clone
        )
        return [make(weight) for _ in range(copies)]

    def _there_and_back(self, num_bytes: int) -> Call:
        """One round of two ranks, each a stage of its own."""
        comm, steps = self._comm, count()
        rows = torch.zeros(1, num_bytes, dtype=torch.uint8, device=self._device)
        is_first = comm.mesh.is_first_stage
        sender = comm.hidden_sender if is_first else comm.sampled_sender
        receiver = comm.sampled_receiver if is_first else comm.hidden_receiver
        if receiver is None:
            raise EngineError("sends are measured between two stages of one rank each")

        def both_ways() -> None:
            header = 0, next(steps)
            if is_first:
                sender.send(header, rows)
            received = receiver.receive(header, (1, num_bytes), torch.uint8, self._device)
            if not is_first:
                sender.send(header, received)

        return both_ways


def _reader(folder: Path) -> Call:
    """Reads every tensor as loading does, and lets go of its pages."""
    checkpoint = Checkpoint(folder)
    name, info = next(iter(checkpoint.tensors.items()))
    source, out = Source(name, info.shape), np.empty(info.shape, bits_dtype(info.dtype))

    def read() -> None:
        checkpoint.read(source, full_box(info.shape), out)
        checkpoint.forget(name)

    return read
