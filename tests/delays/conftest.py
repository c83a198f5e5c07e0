"""Rank processes that heed the plant: one pool for language, one for vision."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator

import pytest
from planting import NETWORK, Plant, planted_pool, stolen_ticks

from bireme.engine.messages import LANGUAGE_MODEL
from bireme.engine.pool import WorkerPool
from bireme.vision.messages import VISION
from bireme.vision.tracing import Traced, trace

MAX_STOLEN = 0.01  # of the cores' time


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """A failure, each time it is tried, on a machine whose host keeps its cores from it is no measurement."""
    ticks, start = stolen_ticks(), time.monotonic()
    try:
        yield
    except Exception:
        stolen_s = (stolen_ticks() - ticks) / os.sysconf("SC_CLK_TCK")
        cores_s = (time.monotonic() - start) * (os.cpu_count() or 1)
        is_last = getattr(item, "execution_count", 1) > (item.config.getoption("reruns", None) or 0)
        if is_last and stolen_s > MAX_STOLEN * cores_s:
            pytest.skip(f"the host took {stolen_s:.2f} of {cores_s:.0f} s from this machine")
        raise


@pytest.fixture(scope="package")
def language_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WorkerPool, Plant]]:
    with planted_pool(tmp_path_factory.mktemp("planted"), LANGUAGE_MODEL) as made:
        yield made


@pytest.fixture(scope="package")
def vision_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WorkerPool, Plant]]:
    with planted_pool(tmp_path_factory.mktemp("planted"), VISION) as made:
        yield made


@pytest.fixture(scope="package")
def traced() -> Traced:
    return trace(NETWORK.build(), NETWORK.image_shape, NETWORK.torch_dtype)
