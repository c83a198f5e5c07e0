"""Made-up weights: a function of (seed, parameter name, global index), the same at every layout.

Matrices have a standard deviation of 1 / sqrt(fan in), so that activations keep their size;
norms are near 1 and biases near 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import xxhash

from bireme.checkpoint.reader import Bits, TensorInfo
from bireme.parallel.boxes import Box, box_shape
from bireme.parallel.layout import Source

_MIX = (np.uint32(0x7FEB352D), np.uint32(0x846CA68B))  # Wellons' lowbias32
_BLOCK_ELEMENTS = 1 << 20


def key_of(seed: int, name: str) -> int:
    """64 bits, of which a parameter's values are a function."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{name}".encode())


def scale_of(source: Source) -> tuple[float, float]:
    """By what uniform numbers are multiplied, and what is added."""
    if len(source.shape) > 1:
        return float(np.float32(math.sqrt(3 / source.shape[-1]))), 0.0
    return float(np.float32(0.1)), float(source.name.endswith("weight"))


def uniform(seed: int, name: str, index: np.ndarray) -> np.ndarray:
    """float32 in [-1, 1) from a hash of each global index (uint64)."""
    key = key_of(seed, name)
    x = (index & np.uint64(0xFFFFFFFF)).astype(np.uint32) ^ np.uint32(key & 0xFFFFFFFF)
    x += (index >> np.uint64(32)).astype(np.uint32) * np.uint32(0x9E3779B9) + np.uint32(key >> 32)
    for multiplier, shift in ((_MIX[0], 16), (_MIX[1], 15)):
        x ^= x >> np.uint32(shift)
        x *= multiplier
    x ^= x >> np.uint32(16)
    return (x >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)


class DummySource:
    """A source that holds every tensor of a layout, of float32 values that hash functions give."""

    def __init__(self, sources: Mapping[str, Source], seed: int) -> None:
        self.seed = seed
        self.tensors = {
            name: TensorInfo("F32", source.view.file_shape(source.shape), 0, 0)
            for name, source in sources.items()
        }

    def read(self, source: Source, box: Box, out: Bits) -> None:
        values = out.view(np.float32)
        shape = source.shape
        strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        rest = np.zeros(box_shape(box[1:]), dtype=np.uint64)
        for dim, ((start, stop), stride) in enumerate(zip(box[1:], strides[1:], strict=True)):
            offsets = np.arange(start, stop, dtype=np.uint64) * np.uint64(stride)
            rest += offsets.reshape((-1,) + (1,) * (len(box) - 2 - dim))
        rows = max(1, _BLOCK_ELEMENTS // max(1, rest.size))
        for first in range(box[0][0], box[0][1], rows):
            last = min(box[0][1], first + rows)
            row_offsets = np.arange(first, last, dtype=np.uint64) * np.uint64(strides[0])
            index = row_offsets.reshape((-1,) + (1,) * rest.ndim) + rest
            values[first - box[0][0] : last - box[0][0]] = self._values(source, index)

    def forget(self, name: str) -> None:
        """Nothing is held."""

    def _values(self, source: Source, index: np.ndarray) -> np.ndarray:
        factor, centre = scale_of(source)
        return uniform(self.seed, source.name, index) * np.float32(factor) + np.float32(centre)
