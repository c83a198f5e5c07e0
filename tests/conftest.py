"""Fixtures that every tier shares: one pool of rank processes for the whole session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bireme.engine.pool import WorkerPool


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Rank processes that join and leave worlds; starting them costs seconds, so tests share them."""
    with WorkerPool() as shared:
        yield shared
