"""What this host is, by its own account."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def nccl_version() -> str | None:
    """Of the library that this process has loaded, as torch does on GPUs: `torch.cuda.nccl.version()` is that of the
    headers that torch was built with. None where there is none."""
    number = ctypes.c_int()
    try:
        library = ctypes.CDLL("libnccl.so.2", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return None
    library.ncclGetVersion(ctypes.byref(number))
    major, rest = divmod(number.value, 10000)
    return f"{major}.{rest // 100}.{rest % 100}"


def memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def load_average() -> float:
    """Of the last minute."""
    return os.getloadavg()[0]
