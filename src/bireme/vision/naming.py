"""Is it a vision model that a name means? Answered without torch."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path

from bireme.vision import huggingface

_LIBRARY = re.compile(r"(torchvision|timm):.+")
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

_MISSPELT = 0.7  # of the letters are right


def is_vision_model(name: str) -> bool:
    """A folder whose model classifies images, a published model by its name, `torchvision:NAME`,
    `timm:NAME` or `module:factory`; also where the published name is misspelt, so that the right one is offered."""
    if Path(name).is_dir():
        return huggingface.is_classifier(Path(name))
    if "/" in name:
        return False
    is_of_code = _LIBRARY.fullmatch(name) or _FACTORY.fullmatch(name)
    return is_of_code is not None or bool(get_close_matches(name, huggingface.SHAPES, 1, _MISSPELT))
