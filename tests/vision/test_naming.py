"""Which names mean a vision model, and which a language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bireme.checkpoint.hub import DEMO
from bireme.vision.model import find_model
from bireme.vision.naming import is_vision_model


@pytest.mark.parametrize(
    "name",
    [
        "resnet-50",
        "vit-b16",
        "torchvision:resnet18",
        "timm:vit_tiny.augreg",
        "my.nets:make",
        "nets:A",
        "resnet-999",  # misspelt: the error offers those that there are
    ],
)
def test_what_means_a_vision_model(name: str) -> None:
    assert is_vision_model(name)


@pytest.mark.parametrize(
    "name",
    [
        DEMO,
        "gpt2",
        "bert",
        "org/resnet-50",
        "localhost:8000",
        "http://a:b",
        "a:b/c",
        "/nowhere",
        "",
    ],
)
def test_what_means_none(name: str) -> None:
    assert not is_vision_model(name)


@pytest.mark.parametrize(
    ("config", "is_vision"),
    [
        ({"architectures": ["ViTForImageClassification"], "model_type": "vit"}, True),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, False),
        ({"model_type": "resnet"}, True),
        ({"model_type": "gpt2", "architectures": None}, False),
        (None, False),
    ],
)
def test_a_folder_is_what_its_config_says(
    config: dict[str, Any] | None, is_vision: bool, tmp_path: Path
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert is_vision_model(str(tmp_path)) is is_vision


def test_a_published_shape_is_found_by_its_name_alone() -> None:
    assert find_model("resnet-18", None) == find_model(None, "resnet-18")
