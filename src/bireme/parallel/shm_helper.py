"""The compiled helper of shared memory, `shm_helper.c`, called by ctypes."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_int, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path

from bireme.native import load_library

_SOURCE = Path(__file__).with_suffix(".c")
REACHED, LATE, INTERRUPTED = range(3)  # what `bireme_await` says


class Group(ctypes.Structure):
    """`struct group`: whose counters and buffers a sum is made of."""

    _fields_ = (
        ("size", c_int32),
        ("me", c_int32),
        ("spin_ns", c_int64),
        ("timeout_ns", c_int64),
        ("counters", POINTER(c_void_p)),
        ("buffers", POINTER(c_void_p)),
    )


class Helper:
    """The functions of `shm_helper.c`; they let other threads of Python run."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.is_usable = _typed(library.bireme_is_usable, c_int)
        self.raise_to = _typed(library.bireme_raise, None, c_void_p, c_uint32)
        self.await_count = _typed(library.bireme_await, c_int, c_void_p, c_uint32, c_int64, c_int64)
        group = POINTER(Group)
        self.all_reduce = _typed(
            library.bireme_all_reduce, c_int, group, c_void_p, c_uint64, c_int, c_uint32
        )
        self.all_gather = _typed(
            library.bireme_all_gather, c_int, group, c_void_p, c_void_p, c_uint64, c_uint32
        )


def _typed(
    function: ctypes._NamedFuncPointer, result: type | None, *arguments: type
) -> ctypes._NamedFuncPointer:
    function.restype, function.argtypes = result, arguments
    return function


def load_helper() -> Helper | None:
    """None where it is switched off, or cannot be made here; the log says why."""
    library = load_library(_SOURCE, ["-ffp-contract=off"])
    if library is None:
        return None
    helper = Helper(library)
    return helper if helper.is_usable() else None
