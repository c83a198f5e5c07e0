"""Fixtures that every tier shares: one pool of rank processes for the whole session."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

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
