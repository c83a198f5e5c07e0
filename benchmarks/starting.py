"""How long a process of its own takes until it has a model's first token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def seconds_to_first_token(settings: Mapping[str, Any], environment: Mapping[str, str]) -> float:
    """Of an `LLM` with these settings, from the start of the process."""
    start = time.monotonic()
    program = Path(__file__).with_name("first_token.py")
    command = [sys.executable, str(program), json.dumps(settings)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env={**os.environ, **environment}
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.monotonic() - start
    if not line:
        raise RuntimeError(f"{' '.join(command)} ended without a token")
    return seconds
