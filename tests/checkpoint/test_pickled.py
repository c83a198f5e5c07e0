"""`.bin` checkpoints are read by `shard` alone, as tensors only, and come back as safetensors."""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bireme.checkpoint import pickled
from bireme.checkpoint.exporter import export
from bireme.checkpoint.opener import open_folder, open_for_sharding
from bireme.checkpoint.pickled import PickledCheckpoint
from bireme.checkpoint.reader import Checkpoint, SafetensorsFile
from bireme.errors import CheckpointError
from checkpoint.making import (
    BLOOM,
    GPT2,
    LLAMA,
    Recipe,
    Tensors,
    check_every_rank,
    matched,
    shard_folder,
    write_safetensors,
)

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}


def as_torch(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(bits.copy()).view(TORCH[dtype])
        for name, (dtype, bits) in tensors.items()
    }


def make(recipe: Recipe, folder: Path, num_files: int = 1, *, is_legacy: bool = False) -> Tensors:
    """The recipe's folder with `.bin` files in place of the safetensors file."""
    tensors = recipe.write(folder)
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    weight_map = {}
    for part in range(num_files):
        mine = names[part::num_files]
        file = f"pytorch_model-{part + 1:05d}-of-{num_files:05d}.bin"
        if num_files == 1:
            file = "pytorch_model.bin"
        state = OrderedDict(as_torch({name: tensors[name] for name in mine}))
        torch.save(state, folder / file, _use_new_zipfile_serialization=not is_legacy)
        weight_map |= dict.fromkeys(mine, file)
    if num_files > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return tensors


@pytest.mark.parametrize(
    ("recipe", "num_files", "is_legacy"),
    [
        (Recipe(), 1, False),
        (Recipe(dtype="F16"), 1, True),
        (Recipe(BLOOM, dtype="F32", prefix=("transformer.", "")), 3, False),
        (Recipe(GPT2, extra={"transformer.h.0.attn.bias": ("U8", (1, 1, 32, 32))}), 1, False),
    ],
    ids=["one file", "older format", "three files", "transposed, with a mask"],
)
def test_every_tensor_comes_through(
    recipe: Recipe, num_files: int, is_legacy: bool, tmp_path: Path
) -> None:
    tensors = make(recipe, tmp_path / "source", num_files, is_legacy=is_legacy)
    artifact = shard_folder(tmp_path / "source", tmp_path / "artifact", (3, 1))
    check_every_rank(tmp_path / "artifact", (2,), tensors)
    again = shard_folder(tmp_path / "artifact", tmp_path / "again", (2, 2))
    assert artifact.check() == again.check() == []
    export(again, tmp_path / "exported")
    found = sorted(path.name for path in (tmp_path / "exported").iterdir())
    assert found == ["config.json", "model.safetensors"]
    file = SafetensorsFile(tmp_path / "exported" / "model.safetensors")
    assert set(file.tensors) == set(tensors)
    assert b'"__metadata__":{"format":"pt"}' in file.header
    for name, (dtype, bits) in tensors.items():
        assert file.tensors[name].dtype == dtype
        assert np.array_equal(file.bits(name), bits)


def test_other_files_are_carried_and_the_bin_files_are_not(tmp_path: Path) -> None:
    recipe = Recipe(others={"tokenizer.json": b"{}", "training_args.bin": b"a pickle of theirs"})
    make(recipe, tmp_path / "source", 2)
    artifact = shard_folder(tmp_path / "source", tmp_path / "artifact", (2,))
    names = {file.name for file in artifact.manifest.carried}
    assert names == {"config.json", "tokenizer.json", "training_args.bin"}


def test_to_run_one_says_to_shard_it_first(tmp_path: Path) -> None:
    make(Recipe(), tmp_path / "source")
    with pytest.raises(
        CheckpointError, match=r"holds \.bin files only; `bireme shard .*source OUT`"
    ):
        open_folder(tmp_path / "source")


def test_safetensors_files_are_preferred(tmp_path: Path) -> None:
    tensors = make(Recipe(), tmp_path / "source")
    write_safetensors(tmp_path / "source" / "model.safetensors", tensors)
    assert isinstance(open_for_sharding(tmp_path / "source"), Checkpoint)


class RunsCode:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["PLANTED"],)


@pytest.mark.parametrize("is_legacy", [False, True])
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(
    is_legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED", str(tmp_path / "planted"))
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": RunsCode()}, path, _use_new_zipfile_serialization=not is_legacy)
    with pytest.raises(CheckpointError) as caught:
        open_for_sharding(tmp_path)
    assert "\n" not in str(caught.value)
    assert re.search(r"pytorch_model\.bin calls \S*mkdir when it is unpickled", str(caught.value))
    assert not (tmp_path / "planted").exists()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch 2.11, while it loads one
@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ([torch.zeros(1)], "holds a list; named tensors are needed"),
        ({"model": {"w": torch.zeros(1)}}, "model is a dict; only tensors are read"),
        ({"w": torch.zeros(1), "step": 3}, "step is a int; only tensors are read"),
        ({"w": torch.zeros(2, 2).to_sparse()}, "w is torch.sparse_coo"),
        ({"w": torch.zeros(2, dtype=torch.complex64)}, "w is torch.strided torch.complex64"),
    ],
)
def test_what_is_no_dict_of_tensors_is_told(state: Any, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path)
    with pytest.raises(CheckpointError) as caught:
        open_for_sharding(tmp_path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


@pytest.mark.parametrize("is_legacy", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_cut_file_is_named_in_one_line(share: float, is_legacy: bool, tmp_path: Path) -> None:
    make(Recipe(), tmp_path / "source", is_legacy=is_legacy)
    path = tmp_path / "source" / "pytorch_model.bin"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError) as caught:
        open_for_sharding(tmp_path / "source")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_tensor_in_two_are_named(tmp_path: Path) -> None:
    make(Recipe(), tmp_path / "source", 3)
    path = tmp_path / "source" / "pytorch_model-00002-of-00003.bin"
    torch.save({"lm_head.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"holds lm_head.weight in pytorch_model-0000\d-of"):
        open_for_sharding(tmp_path / "source")
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{path} is missing"):
        open_for_sharding(tmp_path / "source")


def test_a_tensor_of_the_wrong_shape_is_named_with_its_file(tmp_path: Path) -> None:
    recipe = Recipe()
    make(recipe, tmp_path / "source")
    source = open_for_sharding(tmp_path / "source")
    other = Recipe({**LLAMA, "intermediate_size": 91})
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: model\.\S+ has shape"):
        matched(source, other.model, (1,))


def test_mappings_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickled, "_MAX_MAPPED_BYTES", 5000)
    make(Recipe(), tmp_path / "source", 2)
    source = open_for_sharding(tmp_path / "source")
    assert isinstance(source, PickledCheckpoint)
    for name in source.tensors:
        source.forget(name)
    assert len(source._loaded) < 2
