"""Fills a rank's parameters: each pulls its own boxes, and every element is filled exactly once."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from bireme.checkpoint.drawn import draw
from bireme.checkpoint.dummy import DummySource
from bireme.checkpoint.names import NameMap
from bireme.checkpoint.reader import TensorSource, bits_dtype
from bireme.config import DTYPE_BYTES
from bireme.errors import CheckpointError, ConfigError
from bireme.parallel.layers import named_layouts
from bireme.parallel.layout import Box, Piece, Source, as_slices, box_shape, volume

TORCH_DTYPES = {name: getattr(torch, name) for name in DTYPE_BYTES}
_FROM_FILE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BITS = {2: torch.uint16, 4: torch.uint32}


def torch_dtype(name: str) -> torch.dtype:
    """ConfigError for a dtype that weights cannot have."""
    if name not in TORCH_DTYPES:
        raise ConfigError(f"dtype {name} is not supported; supported are {', '.join(TORCH_DTYPES)}")
    dtype: torch.dtype = TORCH_DTYPES[name]
    return dtype


def load_parameters(model: nn.Module, source: TensorSource, names: NameMap) -> int:
    """Reads every parameter's pieces into it, in its own dtype and on its device.

    Returns how many bytes they are in the source's own dtypes. `names` was matched strictly both
    ways before; a layout whose pieces overlap raises here.
    """
    num_bytes = 0
    for _, module, attribute, layout in named_layouts(model):
        layout.check()
        parameter = getattr(module, attribute).data
        if layout.num_padding:
            parameter.zero_()
        for piece in layout.pieces:
            num_bytes += _fill(parameter, piece, source, names)
            source.forget(names.in_file(piece.source.name))
    return num_bytes


def _fill(parameter: torch.Tensor, piece: Piece, source: TensorSource, names: NameMap) -> int:
    target = parameter[as_slices(piece.local)]
    for _ in range(len(piece.local) - len(piece.box)):  # the expert dim of stacked experts
        target = target.squeeze(0)
    return read_box(target, names.source(piece.source), piece.box, source)


def read_box(target: torch.Tensor, there: Source, box: Box, source: TensorSource) -> int:
    """Fills `target` with the logical `box` of a tensor; returns its bytes in the source."""
    file_dtype = source.tensors[there.name].dtype
    if file_dtype not in _FROM_FILE:
        raise CheckpointError(
            f"{there.name} has the dtype {file_dtype}; weights are {', '.join(_FROM_FILE)}"
        )
    dtype = _FROM_FILE[file_dtype]
    if target.is_cuda and type(source) is DummySource:
        draw(source.seed, there, box, target)
    elif target.dtype == dtype and target.device.type == "cpu":
        source.read(there, box, target.view(_BITS[dtype.itemsize]).numpy())
    else:
        bits = np.empty(box_shape(box), dtype=bits_dtype(file_dtype))
        source.read(there, box, bits)
        target.copy_(torch.from_numpy(bits).view(dtype))
    return volume(box) * dtype.itemsize
