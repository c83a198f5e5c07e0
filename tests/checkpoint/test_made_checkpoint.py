"""What examples/make_checkpoint.py writes is the model of `--load-format dummy`, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bireme.checkpoint.dummy import DummySource
from bireme.checkpoint.names import NameMap
from bireme.checkpoint.opener import open_folder
from bireme.checkpoint.prepared import prepare_model
from bireme.parallel.layers import named_layouts
from checkpoint.making import BLOOM, GPT2, LLAMA, NEOX, layout_of, load_rank, matched

SCRIPT = Path(__file__).parents[2] / "examples" / "make_checkpoint.py"
CONFIGS = {"bloom": BLOOM, "gpt2": GPT2, "gpt-neox": NEOX, "llama": LLAMA}


def _make(config: Mapping[str, Any], folder: Path) -> Path:
    (folder / "shape").mkdir()
    text = json.dumps({**config, "torch_dtype": "bfloat16"})
    (folder / "shape" / "config.json").write_text(text)
    command = [sys.executable, str(SCRIPT), str(folder / "shape"), str(folder / "made")]
    done = subprocess.run(
        [*command, "--seed", "5"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "made"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_made_checkpoint_holds_the_made_up_weights(name: str, tmp_path: Path) -> None:
    folder, widths = _make(CONFIGS[name], tmp_path), (2, 1)
    model = prepare_model(str(folder)).config
    source = open_folder(folder)
    dummy = DummySource(layout_of(model, widths).sources, 5)
    for rank in range(sum(widths)):
        made, _ = load_rank(source, matched(source, model, widths)[1], model, widths, rank)
        made_up, _ = load_rank(dummy, NameMap("", "", ()), model, widths, rank)
        for parameter, _, _, _ in named_layouts(made):
            found, expected = made.get_parameter(parameter), made_up.get_parameter(parameter)
            assert torch.equal(found, expected), parameter


def test_its_tensors_have_the_shapes_of_the_hub_s_files(tmp_path: Path) -> None:
    (file,) = _make(GPT2, tmp_path).glob("*.safetensors")
    assert load_file(file)["transformer.h.0.mlp.c_fc.weight"].shape == (40, 160)
