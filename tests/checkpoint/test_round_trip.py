"""shard -> reshard -> export gives the source back, every file byte for byte, at any layouts; and
an artifact loads at any layout with the source's own bits."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bireme.checkpoint.exporter import export
from bireme.checkpoint.opener import open_folder
from bireme.checkpoint.prepared import prepare_model
from checkpoint.making import (
    BLOOM,
    GPT2,
    LLAMA,
    MIXTRAL,
    NEOX,
    PHI3,
    Recipe,
    Tensors,
    check_every_rank,
    check_parameters,
    files_of,
    load_rank,
    matched,
    shard_folder,
)

TIED = {"tie_word_embeddings": True}
_HEAD = {"lm_head.weight": ("BF16", (200, 48))}


def _with_its_head(tensors: Tensors) -> Tensors:
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}


def _with_its_head_alone(tensors: Tensors) -> Tensors:
    both = _with_its_head(tensors)
    return {name: both[name] for name in both if name != "model.embed_tokens.weight"}


EXTRA_FILES = {
    "tokenizer.json": b'{"model": {}}',
    "README.md": b"# A model\n",
    ".gitattributes": b"*.safetensors lfs\n",
    "original/params.json": b"{}",
    "original/deeper/consolidated.safetensors": b"not even safetensors",
    "pytorch_model.bin": b"the same once more, in another format",
    "manifest.json": b'{"of": "somebody else"}',
    "source/manifest.json": b"a name that we use ourselves",
    "rank-00000-of-00002.safetensors": b"likewise",
    "rank-00000-of-00002.finished.json": b"likewise",
    "empty.txt": b"",
}
RECIPES = {
    "single file": Recipe(),
    "float32": Recipe(dtype="F32"),
    "multi-file": Recipe(num_files=3),
    "old prefix": Recipe(GPT2, prefix=("transformer.", "")),
    "old prefix, multi-file": Recipe(BLOOM, prefix=("transformer.", ""), num_files=2),
    "tied without a head": Recipe({**LLAMA, **TIED}),
    "tied with the same head": Recipe({**LLAMA, **TIED}, change=_with_its_head),
    "tied with another head": Recipe({**LLAMA, **TIED}, extra=_HEAD),
    "tied with the head alone": Recipe({**LLAMA, **TIED}, change=_with_its_head_alone),
    "tied with another head, old prefix": Recipe(
        GPT2, prefix=("transformer.", ""), extra={"lm_head.weight": ("BF16", (150, 40))}
    ),
    "not alphabetical": Recipe(order=lambda name: name[::-1], metadata={"b": "2", "a": '"\u00e9"'}),
    "no metadata": Recipe(metadata=None),
    "unused tensors": Recipe(
        extra={
            **{
                f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": ("F32", (4,))
                for layer in range(4)
            },
            "model.empty.rotary_emb.inv_freq": ("F16", (0, 3)),
            "model.scalar.rotary_emb.inv_freq": ("I64", ()),
        }
    ),
    "transposed": Recipe(
        GPT2, dtype="F32", extra={"transformer.h.0.attn.bias": ("U8", (1, 1, 32, 32))}
    ),
    "interleaved": Recipe(BLOOM, dtype="F16"),
    "interleaved with bias": Recipe(NEOX),
    "stacked experts": Recipe(MIXTRAL, num_files=2),
    "fused": Recipe(PHI3),
    "straddling KV heads": Recipe(
        {**LLAMA, "num_attention_heads": 10, "num_key_value_heads": 2, "head_dim": 8}
    ),
    "one KV head": Recipe({**LLAMA, "num_key_value_heads": 1}),
    "extra files": Recipe(others=EXTRA_FILES),
}
LAYOUTS = [((2,), (3, 2)), ((1, 1), (4,)), ((3, 2), (1, 4, 2)), ((5,), (2, 2))]


@pytest.mark.parametrize("name", RECIPES)
def test_shard_reshard_export_equals_the_source(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    recipe.write(tmp_path / "source")
    source = files_of(tmp_path / "source")
    for number, (first, second) in enumerate(LAYOUTS):
        folder = tmp_path / str(number)
        shard_folder(tmp_path / "source", folder / "first", first)
        artifact = shard_folder(folder / "first", folder / "second", second)
        export(artifact, folder / "exported")
        assert files_of(folder / "exported") == source
        assert artifact.check() == []
        assert artifact.manifest.layout.widths == second


@pytest.mark.parametrize("name", RECIPES)
def test_every_rank_loads_the_source_s_bits_at_any_layout(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    tensors = recipe.write(tmp_path / "source")
    shard_folder(tmp_path / "source", tmp_path / "artifact", (3, 2))
    for widths in ((1,), (3, 2), (2, 1, 3), (5,)):
        check_every_rank(tmp_path / "source", widths, tensors)
        check_every_rank(tmp_path / "artifact", widths, tensors)


@pytest.mark.parametrize(
    "name",
    [
        "single file",
        "tied with the same head",
        "tied with another head",
        "interleaved",
        "one KV head",
    ],
)
@pytest.mark.parametrize("widths", [(1,), (4,), (2, 2), (3, 2), (1, 4)])
def test_at_its_own_layout_each_rank_reads_its_own_file(
    name: str, widths: tuple[int, ...], tmp_path: Path
) -> None:
    recipe = RECIPES[name]
    tensors = recipe.write(tmp_path / "source")
    shard_folder(tmp_path / "source", tmp_path / "artifact", widths)
    world = sum(widths)
    for rank in range(world):
        own = tmp_path / "artifact" / f"rank-{rank:05d}-of-{world:05d}.safetensors"
        hidden = [
            path.rename(path.with_suffix(".hidden"))
            for path in sorted((tmp_path / "artifact").glob("rank-*.safetensors"))
            if path != own
        ]
        source = open_folder(tmp_path / "artifact", rank)
        model = prepare_model(str(tmp_path / "source")).config
        _, names = matched(source, model, widths)
        stage, _ = load_rank(source, names, model, widths, rank)
        check_parameters(stage, names, tensors)
        assert source.stats.fetched == own.stat().st_size
        for path in hidden:
            path.rename(path.with_suffix(".safetensors"))


@st.composite
def models_and_layouts(draw: st.DrawFn) -> tuple[Recipe, tuple[int, ...], tuple[int, ...]]:
    kv_heads = draw(st.integers(1, 4))
    heads = kv_heads * draw(st.integers(1, 3))
    layers = draw(st.integers(1, 3))
    family = draw(st.sampled_from([LLAMA, GPT2, BLOOM, MIXTRAL]))
    head_dim = draw(st.sampled_from([2, 6, 10]))
    is_llama = "num_key_value_heads" in family
    config = {
        **family,
        "vocab_size": draw(st.integers(1, 150)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if is_llama:
        config |= {
            "hidden_size": draw(st.integers(1, 20)),
            "head_dim": head_dim,
            "intermediate_size": draw(st.integers(heads, 70)),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "num_hidden_layers": layers,
        }
    else:
        config |= {"n_head": heads, "n_layer": layers}
        config["n_embd" if family is GPT2 else "hidden_size"] = heads * head_dim
    widths = st.lists(st.integers(1, heads), min_size=1, max_size=layers).map(tuple)
    recipe = Recipe(
        config,
        dtype=draw(st.sampled_from(["F32", "BF16"])),
        order=draw(st.sampled_from([str, lambda name: name[::-1]])),
        num_files=draw(st.integers(1, 2)),
        seed=draw(st.integers(0, 9)),
    )
    return recipe, draw(widths), draw(widths)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(models_and_layouts())
def test_any_shape_at_any_layouts(case: tuple[Recipe, tuple[int, ...], tuple[int, ...]]) -> None:
    recipe, first, second = case
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tensors = recipe.write(folder / "source")
        artifact = shard_folder(folder / "source", folder / "artifact", first)
        check_every_rank(folder / "artifact", second, tensors)
        export(artifact, folder / "exported")
        assert files_of(folder / "exported") == files_of(folder / "source")
