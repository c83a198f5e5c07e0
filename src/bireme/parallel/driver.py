"""Calls of the CUDA driver."""

from __future__ import annotations

import ctypes
from typing import Any

from bireme.errors import EngineError

_NATIVE_ATOMIC_SUPPORTED = 3  # CUdevice_P2PAttribute


def call_driver(name: str, *arguments: Any) -> Any:
    """What a function of the driver made; EngineError if it failed, ImportError where torch's build brings no
    bindings."""
    from cuda.bindings import driver

    error, *made = getattr(driver, name)(*arguments)
    if int(error):
        raise EngineError(f"the CUDA driver refuses: {name} says {error.name}")
    return made[0] if made else None


def has_native_atomics(one: int, other: int) -> bool:
    """Whether GPU `one` does atomic operations in the other's memory, as over NVLink, and not over PCIe. Asked without
    the bindings, which not all builds of torch bring."""
    found = ctypes.c_int()
    ask = ctypes.CDLL("libcuda.so.1").cuDeviceGetP2PAttribute
    if error := ask(ctypes.byref(found), _NATIVE_ATOMIC_SUPPORTED, one, other):
        raise EngineError(f"the CUDA driver refuses: cuDeviceGetP2PAttribute says {error}")
    return bool(found.value)
