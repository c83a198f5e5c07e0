"""One pool of vision ranks for all tests here, and each model traced once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from bireme.engine.pool import WorkerPool
from bireme.vision.messages import VISION
from bireme.vision.model import VisionModel
from bireme.vision.tracing import Traced, trace


@pytest.fixture(scope="session")
def vision_pool() -> Iterator[WorkerPool]:
    with WorkerPool(VISION) as shared:
        yield shared


@pytest.fixture(scope="session")
def trace_once() -> Callable[[VisionModel], Traced]:
    """Traces a model once."""
    known: dict[VisionModel, Traced] = {}

    def of(model: VisionModel) -> Traced:
        if model not in known:
            known[model] = trace(model.build(), model.image_shape, model.torch_dtype)
        return known[model]

    return of
