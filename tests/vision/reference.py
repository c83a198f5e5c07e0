"""What one process computes with plain PyTorch."""

from __future__ import annotations

import torch

from bireme.vision.model import VisionModel
from bireme.vision.weights import materialise, open_weights


@torch.inference_mode()
def whole(model: VisionModel, images: torch.Tensor) -> torch.Tensor:
    """The logits of the whole module, neither traced nor cut."""
    module = model.build()
    out = materialise(module, open_weights(model, module), torch.device("cpu"))(images)
    logits: torch.Tensor = getattr(out, "logits", out)
    return logits
