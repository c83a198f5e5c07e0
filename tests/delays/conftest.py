"""Rank processes that heed the plant: one pool for language, one for vision."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from planting import NETWORK, Plant, planted_pool

from bireme.engine.messages import LANGUAGE_MODEL
from bireme.engine.pool import WorkerPool
from bireme.vision.messages import VISION
from bireme.vision.tracing import Traced, trace


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
