"""Loading into another dtype, made-up weights, and which modules do without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bireme.checkpoint.dummy import DummySource
from bireme.checkpoint.names import NameMap
from bireme.checkpoint.opener import open_folder
from bireme.checkpoint.reader import TensorInfo
from bireme.checkpoint.staging import parts
from bireme.hf_config import from_hf
from bireme.parallel.boxes import Box, as_slices, full_box, volume
from bireme.parallel.layers import named_layouts
from bireme.parallel.layout import Source
from checkpoint.making import LLAMA, Recipe, layout_of, load_rank, matched, shard_folder

KINDS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.mark.parametrize("there", KINDS)
@pytest.mark.parametrize("here", ["float32", "float16", "bfloat16"])
def test_another_dtype_is_torch_s_own_conversion(there: str, here: str, tmp_path: Path) -> None:
    tensors = Recipe(dtype=there).write(tmp_path / "source")
    shard_folder(tmp_path / "source", tmp_path / "artifact", (2,))
    model = from_hf({**LLAMA, "torch_dtype": here})
    for folder in ("source", "artifact"):
        source = open_folder(tmp_path / folder)
        _, names = matched(source, model, (3,))
        stage, _ = load_rank(source, names, model, (3,), 1)
        for name, module, attribute, layout in named_layouts(stage):
            for piece in layout.pieces:
                bits = torch.from_numpy(tensors[piece.source.name][1].copy())
                whole = bits.view(KINDS[there]).to(getattr(torch, here))
                found = getattr(module, attribute)[as_slices(piece.local)]
                expected = whole[as_slices(piece.box)]
                assert torch.equal(found.isnan(), expected.isnan()), name
                assert torch.equal(found.nan_to_num(), expected.nan_to_num()), name


def test_made_up_weights_are_the_same_at_every_layout() -> None:
    model = Recipe(dtype="F32").model
    whole = {
        name: _read(DummySource({name: source}, 3), source, full_box(source.shape))
        for name, source in layout_of(model, (1,)).sources.items()
    }
    for widths in ((3, 2), (5,)):
        for rank in range(sum(widths)):
            sources = layout_of(model, widths).sources
            source = DummySource(sources, 3)
            stage, _ = load_rank(source, NameMap("", "", ()), model, widths, rank)
            for name, module, attribute, layout in named_layouts(stage):
                for piece in layout.pieces:
                    found = getattr(module, attribute)[as_slices(piece.local)].numpy()
                    expected = whole[piece.source.name][as_slices(piece.box)]
                    assert np.array_equal(found, expected), name


def _read(source: DummySource, what: Source, box: tuple[tuple[int, int], ...]) -> np.ndarray:
    out = np.empty([stop - start for start, stop in box], np.uint32)
    source.read(what, box, out)
    return out.view(np.float32)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 8)), min_size=1, max_size=3), st.data())
def test_a_box_of_made_up_weights_is_a_part_of_the_whole(
    sizes: list[tuple[int, int]], data: st.DataObject
) -> None:
    shape = tuple(size for size, _ in sizes)
    box = []
    for size in shape:
        start = data.draw(st.integers(0, size - 1))
        box.append((start, data.draw(st.integers(start + 1, size))))
    source = Source("a.weight", shape)
    dummy = DummySource({"a.weight": source}, 0)
    whole = _read(dummy, source, full_box(shape))
    assert np.array_equal(_read(dummy, source, tuple(box)), whole[as_slices(tuple(box))])


def test_made_up_weights_depend_on_seed_and_name_and_have_a_fair_spread() -> None:
    sources = {name: Source(name, (512, 300)) for name in ("a.weight", "b.weight")}
    first, second = DummySource(sources, 0), DummySource(sources, 1)
    box = full_box((512, 300))
    a, b = (_read(first, sources[name], box) for name in sources)
    assert not np.array_equal(a, b)
    assert not np.array_equal(a, _read(second, sources["a.weight"], box))
    assert abs(a.mean()) < 1e-3
    assert abs(a.std() * 300**0.5 - 1) < 0.01
    assert len(np.unique(a)) > 0.9 * a.size
    assert first.tensors["a.weight"] == TensorInfo("F32", (512, 300), 0, 0)


def test_what_a_front_end_needs_comes_without_torch() -> None:
    names = "reader manifest writer artifact origin sharder exporter names dummy hub files"
    modules = ", ".join(f"bireme.checkpoint.{name}" for name in names.split())
    probe = f"import sys, {modules}; assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


BOXES = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 7)).map(lambda it: (it[0], it[0] + it[1])),
    max_size=4,
).map(tuple)


@given(BOXES, st.integers(1, 50))
def test_parts_are_the_box_in_its_order(box: Box, most: int) -> None:
    order = np.arange(volume(tuple((0, stop) for _, stop in box))).reshape(
        [stop for _, stop in box]
    )
    found = list(parts(box, most))
    assert all(volume(part) <= most for part in found)
    taken = np.concatenate([order[as_slices(part)].ravel() for part in found])
    assert np.array_equal(taken, order[as_slices(box)].ravel())
