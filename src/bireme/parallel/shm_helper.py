"""The compiled helper of shared memory: made once a user from `shm_helper.c`, loaded by ctypes.

Where there is no compiler, or BIREME_COMPILED_HELPER is 0, the same is done from Python.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import stat
import subprocess
import tempfile
from ctypes import POINTER, c_int, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path

_SOURCE = Path(__file__).with_suffix(".c")
# No -march=native: hosts of several kinds may share a home.
_COMPILE = ("cc", "-std=gnu11", "-O3", "-ffp-contract=off", "-shared", "-fPIC")
_COMPILE_S = 60.0
REACHED, LATE, INTERRUPTED = range(3)  # what `bireme_await` says


class Group(ctypes.Structure):
    """`struct group`: whose counters and buffers a sum is made of."""

    _fields_ = (
        ("size", c_int32),
        ("me", c_int32),
        ("num_spins", c_uint32),
        ("timeout_ns", c_int64),
        ("counters", POINTER(c_void_p)),
        ("buffers", POINTER(c_void_p)),
    )


class Helper:
    """The functions of `shm_helper.c`; they let other threads of Python run."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self.is_usable = _typed(library.bireme_is_usable, c_int)
        self.raise_to = _typed(library.bireme_raise, None, c_void_p, c_uint32)
        self.await_count = _typed(
            library.bireme_await, c_int, c_void_p, c_uint32, c_uint32, c_int64
        )
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
    if os.environ.get("BIREME_COMPILED_HELPER") == "0":
        return None
    try:
        helper = Helper(_compiled())
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        logging.getLogger(__name__).info("no compiled helper: %s", reason)
        return None
    return helper if helper.is_usable() else None


def _compiled() -> Path:
    """The library, in the user's cache."""
    source = _SOURCE.read_bytes()
    facts = " ".join((*_COMPILE, platform.machine()))
    key = hashlib.sha256(source + facts.encode()).hexdigest()[:16]
    path = _cache_folder() / f"shm_helper-{key}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as work:
            made = Path(work) / path.name
            subprocess.run(
                [*_COMPILE, "-o", str(made), str(_SOURCE)],
                stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_COMPILE_S,
                check=True,
            )  # fmt: skip
            made.replace(path)
    return path


def _cache_folder() -> Path:
    """Of this user alone: what lies there is run."""
    root = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(root) if root else Path.home() / ".cache") / "bireme"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise PermissionError(f"{folder} is not a folder that this user alone can write")
    return folder
