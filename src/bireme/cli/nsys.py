"""The same command under Nsight Systems. Spans of GPUs are NVTX ranges of the same names."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from bireme.errors import UserError

OPTION = "--nsys"
_REPORT = "nsys"  # in the run folder; nsys adds its own suffix


def find_nsys(folder: Path, arguments: Sequence[str]) -> str:
    """Its path; UserError, and the command on standard output, where there is none."""
    command = _command(folder, arguments)
    path = shutil.which(command[0])
    if path is None:
        print(shlex.join(command), flush=True)
        raise UserError(
            "nsys is not installed, or not on PATH; the command above is for where it is"
        )
    return path


def run_under_nsys(path: str, folder: Path, arguments: Sequence[str]) -> NoReturn:
    """Becomes nsys, which runs `bireme` with these arguments but for the option."""
    sys.stdout.flush()
    os.execv(path, _command(folder, arguments))


def _command(folder: Path, arguments: Sequence[str]) -> list[str]:
    own = [argument for argument in arguments if argument != OPTION]
    return [
        "nsys", "profile", "-t", "cuda,nvtx", "--cuda-graph-trace=node", "--force-overwrite", "true",
        "-o", str(folder / _REPORT), sys.executable, "-m", "bireme", *own,
    ]  # fmt: skip
