"""Where config.json ties the head to the embedding, the files have the last word."""

from __future__ import annotations

from pathlib import Path

import pytest

from bireme.checkpoint.prepared import prepare_model
from bireme.errors import CheckpointError
from checkpoint.making import LLAMA, Recipe, Tensors, shard_folder
from checkpoint.test_pickled import make

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CONFIG = {**LLAMA, "tie_word_embeddings": True, "vocab_size": 20_000}  # several slabs of 1 MiB


def _same(tensors: Tensors) -> Tensors:
    return tensors | {HEAD: tensors[EMBEDDING]}


def _other_at(index: int) -> object:
    def change(tensors: Tensors) -> Tensors:
        dtype, bits = tensors[EMBEDDING]
        other = bits.copy()
        other.reshape(-1)[index] ^= 1
        return tensors | {HEAD: (dtype, other)}

    return change


def _other_dtype(tensors: Tensors) -> Tensors:
    return tensors | {HEAD: ("F16", tensors[EMBEDDING][1])}


CHANGES = {
    "no head": (lambda tensors: tensors, True),
    "the same": (_same, True),
    "other in the first bit": (_other_at(0), False),
    "other in the last element": (_other_at(-1), False),
    "the same bits of another dtype": (_other_dtype, False),
}


@pytest.mark.parametrize(("change", "is_tied"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kind", ["safetensors", "bin", "artifact"])
def test_a_head_is_tied_where_the_files_hold_no_other(
    kind: str, change: object, is_tied: bool, tmp_path: Path
) -> None:
    recipe = Recipe(CONFIG, change=change)  # type: ignore[arg-type]
    if kind == "bin":
        make(recipe, tmp_path / "source", num_files=2)
    else:
        recipe.write(tmp_path / "source")
    folder = tmp_path / "source"
    if kind == "artifact":
        folder = shard_folder(folder, tmp_path / "artifact", (2, 1)).folder
    assert prepare_model(str(folder), reads_bin=True).config.tie_word_embeddings is is_tied


def test_a_head_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    recipe = Recipe(CONFIG, extra={HEAD: ("BF16", (19_999, 48))})
    recipe.write(tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \[19999, 48\]"):
        shard_folder(tmp_path / "source", tmp_path / "artifact", (1,))


def test_config_alone_decides_where_no_weights_are_needed(tmp_path: Path) -> None:
    Recipe(CONFIG, change=_other_at(0)).write(tmp_path / "source")  # type: ignore[arg-type]
    model = prepare_model(str(tmp_path / "source"), needs_weights=False)
    assert model.config.tie_word_embeddings
