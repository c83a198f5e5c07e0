"""The numbers of `dummy`, made where they are wanted: on a GPU in a fraction of a second a gigabyte."""

from __future__ import annotations

import math

import torch

from bireme.checkpoint.dummy import key_of, scale_of
from bireme.kernels.noise import mix_
from bireme.parallel.boxes import Box, box_shape
from bireme.parallel.layout import Source

_ELEMENTS = 1 << 25  # at once
_GOLDEN = 0x9E3779B9 - 2**32


def draw(seed: int, source: Source, box: Box, target: torch.Tensor) -> None:
    """Fills `target`, of the box's shape, with what `DummySource` has there, bit by bit."""
    strides = [math.prod(source.shape[dim + 1 :]) for dim in range(len(source.shape))]
    rest = torch.zeros(box_shape(box[1:]), dtype=torch.int64, device=target.device)
    for dim, ((start, stop), stride) in enumerate(zip(box[1:], strides[1:], strict=True)):
        offsets = torch.arange(start, stop, device=target.device) * stride
        rest += offsets.view((-1,) + (1,) * (len(box) - 2 - dim))
    rows = max(1, _ELEMENTS // max(1, rest.numel()))
    for first in range(box[0][0], box[0][1], rows):
        last = min(box[0][1], first + rows)
        starts = torch.arange(first, last, device=target.device) * strides[0]
        index = starts.view((-1,) + (1,) * rest.dim()) + rest
        factor, centre = scale_of(source)
        values = _uniform(key_of(seed, source.name), index).mul_(factor).add_(centre)
        target[first - box[0][0] : last - box[0][0]].copy_(values)


def _uniform(key: int, index: torch.Tensor) -> torch.Tensor:
    """float32 in [-1, 1) from a hash of each global index; words of 32 bits are held in int32, which wraps."""
    low, high = _signed(key & 0xFFFFFFFF), _signed(key >> 32)
    x = index.to(torch.int32).bitwise_xor_(low)
    x += (index >> 32).to(torch.int32).mul_(_GOLDEN).add_(high)
    top = (mix_(x) >> 8).bitwise_and_(0xFFFFFF)
    return top.float().mul_(2.0**-23).sub_(1)


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word
