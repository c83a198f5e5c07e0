"""Cut, corrupt, missing, wrong-shape and foreign files: one line that names file and tensor."""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from bireme.checkpoint import artifact as artifact_module
from bireme.checkpoint import exporter, sharder, writer
from bireme.checkpoint import manifest as manifest_module
from bireme.checkpoint.artifact import Artifact
from bireme.checkpoint.exporter import export
from bireme.checkpoint.manifest import read_manifest, write_manifest
from bireme.checkpoint.opener import open_folder
from bireme.checkpoint.reader import Checkpoint, SafetensorsFile
from bireme.errors import CheckpointError
from checkpoint.making import (
    LLAMA,
    Recipe,
    check_every_rank,
    load_rank,
    matched,
    shard_folder,
    write_safetensors,
)

RECIPE = Recipe(others={"tokenizer.json": b'{"model": {}}'})
WIDTHS = (2, 1)
LAST = "rank-00002-of-00003.safetensors"  # stage 1: layers 2 and 3
TENSOR = "model.layers.3.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    RECIPE.write(folder / "source")
    shard_folder(folder / "source", folder / "artifact", WIDTHS)
    return folder


@pytest.fixture
def source(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "source", tmp_path / "source"))


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "artifact", tmp_path / "artifact"))


def load_all(folder: Path) -> None:
    """What the ranks of the artifact's own layout do, after the driver's check."""
    source = open_folder(folder)
    if isinstance(source, Artifact):
        source.check_files()
    for rank in range(sum(WIDTHS)):
        source = open_folder(folder, rank)
        _, names = matched(source, RECIPE.model, WIDTHS)
        load_rank(source, names, RECIPE.model, WIDTHS, rank)


def complaint(action: Callable[[], Any]) -> str:
    """The one line that a user reads."""
    with pytest.raises(CheckpointError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def place(path: Path, name: str) -> tuple[int, int]:
    """The bytes of a tensor in its file."""
    info = SafetensorsFile(path).tensors[name]
    return info.start, info.stop


# --- artifacts ----------------------------------------------------------------------------------


def test_a_flipped_byte_is_blamed_on_its_rank_layer_and_tensor(artifact: Path) -> None:
    start, stop = place(artifact / LAST, TENSOR)
    flip(artifact / LAST, (start + stop) // 2)
    said = complaint(lambda: load_all(artifact))
    for part in (str(artifact / LAST), "rank 2", "layer 3", f"tensor {TENSOR}", "corrupt"):
        assert part in said
    assert Artifact(artifact).check() == [said]
    assert complaint(lambda: export(Artifact(artifact), artifact.parent / "out")) == said


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "carried"])
@pytest.mark.parametrize("target", ["new", "empty", "a/b"])
def test_a_failed_export_leaves_its_target_as_it_was(
    damage: str, target: str, artifact: Path, tmp_path: Path
) -> None:
    path = artifact / ("tokenizer.json" if damage == "carried" else LAST)
    kept = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(kept[:-1])
    else:
        flip(path, len(kept) // 2)
    parent = tmp_path / "targets"
    out = parent / target
    parent.mkdir()
    if target == "empty":
        out.mkdir()
    before = sorted(parent.rglob("*"))
    assert str(path) in complaint(lambda: export(Artifact(artifact), out))
    assert sorted(parent.rglob("*")) == before
    path.write_bytes(kept)
    export(Artifact(artifact), out)
    assert (out / "tokenizer.json").read_bytes() == RECIPE.others["tokenizer.json"]


def test_a_failed_export_keeps_what_others_put_beside_its_files(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def fail(*_: Any) -> Any:
        (out / "mine").write_text("mine")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter, "read_slabs", fail)
    assert "No space left" in complaint(lambda: export(Artifact(artifact), out))
    assert list(out.iterdir()) == [out / "mine"]


def test_every_tensor_can_be_blamed_and_only_that(artifact: Path) -> None:
    for path in sorted(artifact.glob("rank-*.safetensors")):
        for key, info in SafetensorsFile(path).tensors.items():
            for at in (info.start, info.stop - 1):
                flip(path, at)
                (finding,) = Artifact(artifact).check()
                assert f"tensor {key} " in finding
                assert str(path) in finding
                flip(path, at)
    assert Artifact(artifact).check() == []


def test_a_rank_whose_own_bytes_are_good_loads_beside_a_damaged_one(artifact: Path) -> None:
    start, _ = place(artifact / LAST, TENSOR)
    flip(artifact / LAST, start)
    for rank in (0, 1):
        source = open_folder(artifact, rank)
        _, names = matched(source, RECIPE.model, WIDTHS)
        load_rank(source, names, RECIPE.model, WIDTHS, rank)


@pytest.mark.parametrize("at", [0, 7, 8, 60, -1])
def test_a_flipped_byte_of_the_header_is_found_before_it_is_believed(
    at: int, artifact: Path
) -> None:
    path = artifact / LAST
    header_bytes = read_manifest(artifact).files[2].header_bytes
    flip(path, at % header_bytes)
    said = complaint(lambda: load_all(artifact))
    assert f"{path} is corrupt in its header" in said
    assert "rank 2" in said
    assert Artifact(artifact).check() == [said]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9999])
def test_a_cut_file_is_named_with_the_first_tensor_that_is_gone(
    share: float, artifact: Path
) -> None:
    path = artifact / LAST
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    said = complaint(lambda: load_all(artifact))
    assert f"{path} is cut" in said
    assert re.search(r"rank 2, (layer \d, )?tensor \S+", said)
    assert Artifact(artifact).check() == [said]


def test_bytes_after_the_end_are_no_part_of_the_file(artifact: Path) -> None:
    with (artifact / LAST).open("ab") as file:
        file.write(b"more")
    assert str(artifact / LAST) in complaint(lambda: load_all(artifact))


def test_a_missing_file_is_named_with_what_it_holds(artifact: Path) -> None:
    (artifact / LAST).unlink()
    said = complaint(lambda: load_all(artifact))
    assert f"{artifact / LAST} is missing; it holds" in said
    assert "rank 2, layer 3, tensor model.layers.3." in said
    assert Artifact(artifact).check() == [said]


def test_a_file_of_another_shape_or_dtype_is_refused(artifact: Path) -> None:
    """Its own bytes are consistent; the manifest knows better."""
    path = artifact / LAST
    tensors = {
        name: (info.dtype, np.array(SafetensorsFile(path).bits(name)))
        for name, info in SafetensorsFile(path).tensors.items()
    }
    manifest = read_manifest(artifact)
    for change, expected in [
        (lambda dtype, bits: (dtype, bits.T), "BF16"),
        (lambda dtype, bits: ("F16", bits), "F16"),
    ]:
        write_safetensors(path, {**tensors, TENSOR: change(*tensors[TENSOR])})
        header = writer.with_length(SafetensorsFile(path).header)
        changed = msgspec.structs.replace(
            manifest.files[2],
            num_bytes=path.stat().st_size,
            header_bytes=len(header),
            header_xxh3=manifest_module.xxhash.xxh3_64_hexdigest(header),
        )
        files = [*manifest.files[:2], changed]
        write_manifest(artifact, msgspec.structs.replace(manifest, files=files))
        said = complaint(lambda: load_all(artifact))
        assert f"rank 2, layer 3, tensor {TENSOR} is {expected}" in said
        assert "the manifest says BF16" in said


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_carried_file_that_was_damaged_is_named(name: str, artifact: Path) -> None:
    flip(artifact / name, 0)
    (finding,) = Artifact(artifact).check()
    assert f"{artifact / name} is corrupt" in finding
    said = complaint(lambda: export(Artifact(artifact), artifact.parent / "out"))
    assert f"{artifact / name} is corrupt" in said
    reshard = artifact.parent / "resharded"
    said = complaint(lambda: shard_folder(artifact, reshard, (1,)))
    assert f"{artifact / name} is corrupt" in said or f"{artifact / name} cannot be read" in said
    (artifact / name).unlink()
    assert Artifact(artifact).check() == [f"{artifact / name} is missing"]
    said = complaint(lambda: export(Artifact(artifact), artifact.parent / "out2"))
    assert str(artifact / name) in said


def test_any_flipped_byte_of_the_manifest_is_found(artifact: Path) -> None:
    path = artifact / "manifest.json"
    original = path.read_bytes()
    for at in range(0, len(original), 97):
        if original[at : at + 1].isspace():
            continue
        flip(path, at)
        assert str(path) in complaint(lambda: read_manifest(artifact))
        path.write_bytes(original)


@pytest.mark.parametrize("manifest", [None, "", "{", "{}"])
def test_an_artifact_without_its_manifest_is_no_checkpoint(
    manifest: str | None, artifact: Path
) -> None:
    path = artifact / "manifest.json"
    path.unlink()
    if manifest is not None:
        path.write_text(manifest)
    for use in (load_all, Artifact, lambda folder: shard_folder(folder, folder.parent / "o", (1,))):
        said = complaint(lambda use=use: use(artifact))
        assert f"{path} is missing or broken, though rank-00000-of-00003.safetensors" in said
        assert "shard its source again" in said


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"version": 2}, "version 2; this release reads bireme-sharded-checkpoint version 1"),
        ({"format": "bireme-sharded-checkpoint-2"}, "is bireme-sharded-checkpoint-2 version 1"),
    ],
)
def test_a_manifest_of_another_version_is_refused(
    change: dict[str, Any], expected: str, artifact: Path
) -> None:
    path = artifact / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change, "files": "other"}))
    assert expected in complaint(lambda: Artifact(artifact))


def test_a_manifest_that_leaves_its_folder_is_refused(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    replace = msgspec.structs.replace
    for outside in ("/etc/passwd", "../escape", "a/../../escape", ""):
        for changed in (
            replace(manifest, files=[replace(manifest.files[0], name=outside)]),
            replace(manifest, carried=[replace(manifest.carried[0], stored=outside)]),
            replace(manifest, carried=[replace(manifest.carried[0], name=outside)]),
            replace(manifest, sources=[replace(manifest.sources[0], name=outside)]),
        ):
            write_manifest(artifact, changed)
            assert "outside the artifact" in complaint(lambda: Artifact(artifact))


def test_a_manifest_of_nonsense_is_refused(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    replace = msgspec.structs.replace
    tensor = manifest.tensors[TENSOR]
    (piece,) = tensor.pieces
    wide = ((0, 10**6), (0, 90))
    for changed, expected in [
        (replace(tensor, dtype="F12"), "unknown dtype F12"),
        (replace(tensor, view="mirror"), "unknown view mirror"),
        (replace(tensor, view="interleave:0:1"), "unknown view"),
        (replace(tensor, pieces=[replace(piece, box=wide)]), "piece at ((0, 1000000)"),
        (replace(tensor, pieces=[replace(piece, box=((0, 1),))]), "a piece at ((0, 1),)"),
        (replace(tensor, pieces=[replace(piece, file="other")]), "other, which it does not list"),
        (replace(tensor, pieces=[replace(piece, chunks=[])]), "the manifest has 0 hashes"),
    ]:
        write_manifest(artifact, replace(manifest, tensors={**manifest.tensors, TENSOR: changed}))
        said = complaint(lambda: Artifact(artifact).check_files())
        assert expected in said
        assert TENSOR in said


def test_a_tensor_that_lies_nowhere_is_found(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    tensor = msgspec.structs.replace(manifest.tensors[TENSOR], pieces=[])
    tensors = {**manifest.tensors, TENSOR: tensor}
    write_manifest(artifact, msgspec.structs.replace(manifest, tensors=tensors))
    assert "the manifest does not know" in complaint(lambda: load_all(artifact))
    unknown, nowhere = Artifact(artifact).check()
    assert f"{artifact / LAST} holds rank 2, layer 3, tensor {TENSOR}, which" in unknown
    assert f"4320 elements of {TENSOR} are in no file" in nowhere


# --- source checkpoints -------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9999])
def test_a_cut_source_is_named(share: float, source: Path) -> None:
    path = source / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    said = complaint(lambda: Checkpoint(source))
    assert f"{path} is cut" in said
    assert share < 0.5 or re.search(r"model\.\S+ ends at byte", said)


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b"not json", "broken header"),
        (b'{"a": 1}', "broken header"),
        (b"[1, 2, 3]", "broken header"),
        (b'{"a": "\xff\xfe"}', "broken header"),
        (b'{"__metadata__": {"a": "\xff\xfe"}}', "broken header"),
        (json.dumps({"a": entry(shape=[-2])}).encode(), "broken header"),
        (json.dumps({"a": entry(dtype="F12")}).encode(), "a has the unknown dtype F12"),
        (json.dumps({"a": entry(shape=[3])}).encode(), "a of shape [3] and dtype F32 needs 12"),
        (json.dumps({"a": entry(data_offsets=[8, 0])}).encode(), "needs 8 bytes, not -8"),
        (json.dumps({"a": entry(data_offsets=[4, 12])}).encode(), "is cut: a ends at"),
        (json.dumps({"a": entry(shape=[1], data_offsets=[4, 8])}).encode(), "a begins at byte"),
        (json.dumps({"a": entry(), "b": entry()}).encode(), "b begins at byte"),
        (json.dumps({"a": entry(shape=[1], data_offsets=[0, 4])}).encode(), "tensors end at"),
    ],
)
def test_a_broken_header_is_told(header: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    said = complaint(lambda: Checkpoint(tmp_path))
    assert str(path) in said
    assert expected in said


def test_a_missing_file_of_an_index_is_named_with_a_tensor_of_it(tmp_path: Path) -> None:
    Recipe(num_files=3).write(tmp_path / "source")
    path = tmp_path / "source" / "model-00002-of-00003.safetensors"
    path.unlink()
    said = complaint(lambda: Checkpoint(tmp_path / "source"))
    assert f"{path} is missing" in said
    assert "model.layers." in said


def test_an_index_that_leaves_its_folder_is_refused(source: Path) -> None:
    (source / "model.safetensors").rename(source.parent / "model.safetensors")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    assert "outside the folder" in complaint(lambda: Checkpoint(source))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / "model.safetensors"
    path.unlink()
    write_safetensors(path, change(RECIPE.tensors()))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: {**t, TENSOR: ("BF16", t[TENSOR][1].T)}, "has shape [90, 48]; config.json asks"),
        (lambda t: {**t, TENSOR: ("I16", t[TENSOR][1])}, "is I16; supported are F32, F16, BF16"),
        (lambda t: {n: v for n, v in t.items() if n != TENSOR}, "lacks 1 of"),
        (lambda t: {**t, "adapter.weight": t[TENSOR]}, "holds adapter.weight, which the model"),
    ],
)
def test_what_the_model_does_not_expect_is_named(
    change: Callable[[dict[str, Any]], dict[str, Any]], expected: str, source: Path
) -> None:
    rewrite(source, change)
    said = complaint(lambda: load_all(source))
    assert expected in said
    assert str(source) in said
    assert TENSOR in said or "adapter.weight" in said


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        write_safetensors(tmp_path / name, {"w": ("U8", np.zeros(3, np.uint8))})
    assert "holds w in a.safetensors and b.safetensors" in complaint(lambda: Checkpoint(tmp_path))


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_a_folder_without_weights_is_no_checkpoint(folder: str, tmp_path: Path) -> None:
    assert "no checkpoint" in complaint(lambda: Checkpoint(tmp_path / folder))


# --- where to write -----------------------------------------------------------------------------


def test_the_source_or_a_folder_in_it_is_no_target(source: Path, artifact: Path) -> None:
    before = sorted(source.rglob("*"))
    for target in (source, source / "sharded", source / ".." / "source"):
        assert str(target) in complaint(lambda target=target: shard_folder(source, target, WIDTHS))
    assert str(artifact) in complaint(lambda: export(Artifact(artifact), artifact / "exported"))
    assert sorted(source.rglob("*")) == before


@pytest.mark.parametrize("name", ["thesis.tex", "rank-00000-of-00007.safetensors", "folder/x"])
def test_a_folder_with_anything_else_in_it_is_no_target(
    name: str, source: Path, artifact: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    out = tmp_path / "out"
    assert "not empty" in complaint(lambda: shard_folder(source, out, WIDTHS))
    assert "not empty" in complaint(lambda: export(Artifact(artifact), out))
    assert [path for path in out.rglob("*") if path.is_file()] == [mine]


def test_a_finished_artifact_is_no_target(source: Path, artifact: Path) -> None:
    said = complaint(lambda: shard_folder(source, artifact, WIDTHS))
    assert "finished artifact" in said


def test_a_file_is_no_target(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    said = complaint(lambda: shard_folder(source, tmp_path / "out", WIDTHS))
    assert "is a file" in said


def test_too_little_disk_is_told_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(sharder.shutil, "disk_usage", lambda _: usage(2000, 1000, 1000))
    said = complaint(lambda: shard_folder(source, tmp_path / "out", WIDTHS))
    assert re.search(r"out has 1000 bytes free on its disk; \d+ are needed", said)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_is_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "read_slabs", fail)
    said = complaint(lambda: shard_folder(source, tmp_path / "out", WIDTHS))
    assert "rank-00000-of-00003.safetensors cannot be written: No space left on device" in said


# --- chunks -------------------------------------------------------------------------------------


def test_many_small_chunks_are_verified_where_they_are_touched(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With chunks of 64 bytes, a row of a matrix can be damaged that another rank never reads."""
    for module in (manifest_module, artifact_module, writer):
        monkeypatch.setattr(module, "CHUNK_BYTES", 64)
    monkeypatch.setattr(writer, "SLAB_BYTES", 100)
    out = tmp_path / "artifact"
    shard_folder(made / "source", out, (1,))
    for widths in ((1,), (3,), (2, 1, 1)):
        check_every_rank(out, widths, RECIPE.tensors())
    path = out / "rank-00000-of-00001.safetensors"
    name = "model.layers.1.mlp.up_proj.weight"
    start, stop = place(path, name)
    flip(path, stop - 1)
    (finding,) = Artifact(out).check()
    assert f"rank 0, layer 1, tensor {name}" in finding
    first, last = map(int, re.findall(r"bytes (\d+) to (\d+)", finding)[0])
    assert start < first < last == stop
    assert last - first <= 64
    for rank, is_hit in ((0, False), (1, False), (2, True)):
        source = open_folder(out, rank)
        _, names = matched(source, RECIPE.model, (3,))
        if is_hit:
            assert name in complaint(
                lambda source=source, names=names: load_rank(source, names, RECIPE.model, (3,), 2)
            )
        else:
            load_rank(source, names, RECIPE.model, (3,), rank)


def test_the_config_says_what_a_source_must_hold(source: Path) -> None:
    """The same files under a config with one layer less: their tensors are unknown, by name."""
    model = Recipe({**LLAMA, "num_hidden_layers": 3}).model
    said = complaint(lambda: matched(open_folder(source), model, (1,)))
    assert "model.layers.3." in said
    assert "config.json" in said
