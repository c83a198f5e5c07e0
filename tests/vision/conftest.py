"""One pool of vision ranks for all tests here, and what one process computes with plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from bireme.engine.pool import WorkerPool
from bireme.vision.messages import VISION
from bireme.vision.model import VisionModel
from bireme.vision.tracing import Traced, trace
from bireme.vision.weights import materialise, open_weights


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


@torch.inference_mode()
def whole(model: VisionModel, images: torch.Tensor) -> torch.Tensor:
    """The logits of the whole module, neither traced nor cut."""
    module = model.build()
    out = materialise(module, open_weights(model, module), torch.device("cpu"))(images)
    logits: torch.Tensor = getattr(out, "logits", out)
    return logits
