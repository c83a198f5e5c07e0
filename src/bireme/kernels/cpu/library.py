"""The functions of `kernels.c`, called by ctypes."""

from __future__ import annotations

import ctypes
import platform
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

from bireme.native import load_library

KINDS = {torch.float32: 0, torch.bfloat16: 1}  # as there
# so that loops are vectorised: nobody asks for errno or floating-point traps
_FLAGS = ("-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
_X86_FLAGS = ("-mprefer-vector-width=512",)
_COUNT = c_int64


class Heads(ctypes.Structure):
    """`struct heads`"""

    _fields_ = (("queries", c_int64), ("kv", c_int64), ("size", c_int64))


class Scoring(ctypes.Structure):
    """`struct scoring`"""

    _fields_ = (("scale", c_float), ("cap", c_float), ("window", c_int64), ("slopes", c_void_p))


class Library:
    """The functions; they let other threads of Python run."""

    def __init__(self, library: ctypes.CDLL) -> None:
        heads = POINTER(Heads)
        self.norm = library.bireme_norm
        self.norm.argtypes = (c_int, *[c_void_p] * 5, _COUNT, _COUNT, c_float, c_float)
        self.silu_mul = library.bireme_silu_mul
        self.silu_mul.argtypes = (c_int, c_void_p, c_void_p, _COUNT, _COUNT)
        self.rope_and_write = library.bireme_rope_and_write
        self.rope_and_write.argtypes = (c_int, *[c_void_p] * 7, _COUNT, _COUNT, _COUNT, heads)
        self.attention_floats = library.bireme_attention_floats
        self.attention_floats.argtypes, self.attention_floats.restype = (heads,), _COUNT
        self.decode_attention = library.bireme_decode_attention
        self.decode_attention.argtypes = (
            c_int, *[c_void_p] * 4, _COUNT, c_void_p, c_void_p, c_void_p, _COUNT,
            heads, POINTER(Scoring), c_void_p,
        )  # fmt: skip
        for function in (self.norm, self.silu_mul, self.rope_and_write, self.decode_attention):
            function.restype = None


@cache
def library() -> Library | None:
    """None where it cannot be made."""
    flags = _FLAGS + (_X86_FLAGS if platform.machine() == "x86_64" else ())
    found = load_library(Path(__file__).with_name("kernels.c"), flags)
    return None if found is None else Library(found)
