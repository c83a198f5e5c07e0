"""Code in C beside its caller in Python: compiled once a user, kept in a folder of the user's cache.

Callers do without where there is no compiler, or where BIREME_COMPILED_HELPER is 0.
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
from collections.abc import Sequence
from pathlib import Path

# No -march=native: hosts of several kinds may share a home.
_COMPILE = ("cc", "-std=gnu11", "-O3", "-shared", "-fPIC")
_COMPILE_S = 60.0


def is_switched_off() -> bool:
    return os.environ.get("BIREME_COMPILED_HELPER") == "0"


def load_library(source: Path, flags: Sequence[str] = ()) -> ctypes.CDLL | None:
    """None where it is switched off, or cannot be made here; the log says why."""
    if is_switched_off():
        return None
    try:
        return ctypes.CDLL(str(_compiled(source, [*_COMPILE, *flags])))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        is_missing = isinstance(error, FileNotFoundError)  # the compiler, which nobody needs
        reason = getattr(error, "stderr", None) or error
        logging.getLogger(__name__).log(
            logging.INFO if is_missing else logging.WARNING,
            "%s is not compiled, which is slower: %s", source.name, reason,
        )  # fmt: skip
        return None


def _compiled(source: Path, command: Sequence[str]) -> Path:
    """The library, in the user's cache."""
    facts = " ".join((*command, platform.machine()))
    key = hashlib.sha256(source.read_bytes() + facts.encode()).hexdigest()[:16]
    path = _cache_folder() / f"{source.stem}-{key}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as work:
            made = Path(work) / path.name
            subprocess.run(
                [*command, "-o", str(made), str(source)],
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
