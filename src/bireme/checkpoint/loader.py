"""Fills a rank's parameters: each pulls its own boxes, and every element is filled exactly once."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Self

import numpy as np
import torch
from torch import nn

from bireme.checkpoint.drawn import draw
from bireme.checkpoint.dummy import DummySource
from bireme.checkpoint.names import NameMap
from bireme.checkpoint.reader import TensorSource, bits_dtype
from bireme.checkpoint.staging import BITS, Staging
from bireme.config import DTYPE_BYTES
from bireme.errors import CheckpointError, ConfigError
from bireme.parallel.boxes import Box, as_slices, box_shape, volume
from bireme.parallel.layers import named_layouts
from bireme.parallel.layout import Piece, Source

TORCH_DTYPES = {name: getattr(torch, name) for name in DTYPE_BYTES}
_FROM_FILE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def torch_dtype(name: str) -> torch.dtype:
    """ConfigError for a dtype that weights cannot have."""
    if name not in TORCH_DTYPES:
        raise ConfigError(f"dtype {name} is not supported; supported are {', '.join(TORCH_DTYPES)}")
    dtype: torch.dtype = TORCH_DTYPES[name]
    return dtype


def load_parameters(
    model: nn.Module, source: TensorSource, names: NameMap, num_threads: int = 1
) -> int:
    """Reads every parameter's pieces into it, in its own dtype and on its device; up to `num_threads` read at once,
    each a tensor of the source.

    Returns how many bytes they are in the source's own dtypes. `names` was matched strictly both
    ways before; a layout whose pieces overlap raises here.
    """
    wanted: dict[str, list[tuple[torch.Tensor, Piece]]] = {}
    for _, module, attribute, layout in named_layouts(model):
        layout.check()
        parameter = getattr(module, attribute).data
        if layout.num_padding:
            parameter.zero_()
        for piece in layout.pieces:
            wanted.setdefault(piece.source.name, []).append((parameter, piece))
    devices = {parameter.device for places in wanted.values() for parameter, _ in places}
    device = devices.pop() if devices else torch.device("cpu")
    is_drawn = device.type == "cuda" and type(source) is DummySource
    with _Readers(source, names, device, 1 if is_drawn else num_threads) as readers:
        return readers.read(wanted)


class _Readers:
    """Threads that read tensors of a source, each with a way to the device of its own."""

    def __init__(
        self, source: TensorSource, names: NameMap, device: torch.device, num_threads: int
    ) -> None:
        self._source, self._names, self._device = source, names, device
        self._own = threading.local()
        self._pool = ThreadPoolExecutor(num_threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()  # of streams that nothing is done on any more

    @property
    def _staging(self) -> Staging | None:
        """This thread's."""
        if self._device.type != "cuda":
            return None
        if not hasattr(self._own, "staging"):
            self._own.staging = Staging(self._device)
        staging: Staging = self._own.staging
        return staging

    def read(self, wanted: Mapping[str, Sequence[tuple[torch.Tensor, Piece]]]) -> int:
        return sum(self._pool.map(self._read_tensor, wanted, wanted.values()))

    def _read_tensor(self, name: str, places: Sequence[tuple[torch.Tensor, Piece]]) -> int:
        num_bytes = 0
        for parameter, piece in places:
            target = parameter[as_slices(piece.local)]
            for _ in range(len(piece.local) - len(piece.box)):  # the expert dim of stacked experts
                target = target.squeeze(0)
            there = self._names.source(piece.source)
            num_bytes += read_box(target, there, piece.box, self._source, self._staging)
        self._source.forget(self._names.in_file(name))
        return num_bytes


def read_box(
    target: torch.Tensor,
    there: Source,
    box: Box,
    source: TensorSource,
    staging: Staging | None = None,
) -> int:
    """Fills `target` with the logical `box` of a tensor, by way of `staging` where there is one; returns its bytes
    in the source."""
    file_dtype = source.tensors[there.name].dtype
    if file_dtype not in _FROM_FILE:
        raise CheckpointError(
            f"{there.name} has the dtype {file_dtype}; weights are {', '.join(_FROM_FILE)}"
        )
    dtype = _FROM_FILE[file_dtype]
    if target.is_cuda and type(source) is DummySource:
        draw(source.seed, there, box, target)
    elif target.dtype == dtype and target.device.type == "cpu":
        source.read(there, box, target.view(BITS[dtype.itemsize]).numpy())
    elif staging is not None:
        staging.fill(target, box, dtype, partial(source.read, there))
    else:
        bits = np.empty(box_shape(box), dtype=bits_dtype(file_dtype))
        source.read(there, box, bits)
        target.copy_(torch.from_numpy(bits).view(dtype))
    return volume(box) * dtype.itemsize
