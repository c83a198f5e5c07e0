"""Tensors whose blocks a Hopper GPU fetches by itself (the tensor memory accelerator): a kernel names a block's place,
and no thread works out addresses. What lies beyond the tensor is 0."""

from __future__ import annotations

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from bireme.kernels.choice import is_hopper

_MULTIPLE = 16  # bytes, of addresses and strides


def can_be_described(x: torch.Tensor) -> bool:
    """Whether blocks of the 16-bit tensor x are fetched so. Without a GPU, in Triton's interpreter, those of float16
    alone: NumPy has no bfloat16."""
    has_way = is_hopper(x.device) if x.device.type == "cuda" else x.dtype == torch.float16
    return (
        has_way
        and x.element_size() == 2
        and x.stride(-1) == 1
        and all(stride * 2 % _MULTIPLE == 0 for stride in x.stride()[:-1])
        and x.data_ptr() % _MULTIPLE == 0
    )


def described(x: torch.Tensor, block: list[int]) -> TensorDescriptor:
    """x by blocks of such a size. Its strides but the last, of 1, may be in any order."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)
