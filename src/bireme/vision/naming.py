"""Is it a vision model that a name means? Answered without torch."""

from __future__ import annotations

import re
from pathlib import Path

from bireme.vision import huggingface

_LIBRARY = re.compile(r"(torchvision|timm):.+")
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_vision_model(name: str) -> bool:
    """A folder whose model classifies images, a published model by its name, `torchvision:NAME`,
    `timm:NAME` or `module:factory`."""
    if Path(name).is_dir():
        return huggingface.is_classifier(Path(name))
    is_of_code = _LIBRARY.fullmatch(name) or _FACTORY.fullmatch(name)
    return is_of_code is not None or name in huggingface.SHAPES
