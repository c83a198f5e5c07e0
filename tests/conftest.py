"""Fixtures that every tier shares: one pool of rank processes for the whole session."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

if not Path("/dev/nvidiactl").exists():
    # Triton heeds it when it is first imported, by whichever test: its kernels run without a GPU.
    os.environ["TRITON_INTERPRET"] = "1"

from bireme.engine.pool import WorkerPool


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Rank processes that join and leave worlds; starting them costs seconds, so tests share them."""
    with WorkerPool() as shared:
        yield shared


@pytest.fixture(scope="session", autouse=True)
def _heeds_ctrl_c() -> None:
    """A shell starts what it runs in the background with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
