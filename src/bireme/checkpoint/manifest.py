"""The manifest of a sharded checkpoint: what lies where, how to trust it, how to undo it.

An artifact is a folder with one safetensors file a rank (boxes of logical tensors), `unused`
tensors, copies of the other files, and `manifest.json`, which is written last.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import xxhash

from bireme.errors import CheckpointError
from bireme.parallel.layout import Box, View

FORMAT = "bireme-sharded-checkpoint"
VERSION = 1
CHUNK_BYTES = 4 * 1024 * 1024
MANIFEST_NAME = "manifest.json"
UNUSED_NAME = "unused.safetensors"


class StoredFile(msgspec.Struct, frozen=True):
    """A file of the artifact; `chunks` are xxh3-64 of every 4 MiB, in hexadecimal."""

    name: str
    num_bytes: int
    chunks: list[str]


class StoredPiece(msgspec.Struct, frozen=True):
    """`box` of the logical tensor is the tensor `key` of `file`; `xxh3` is that of its bytes."""

    file: str
    key: str
    box: Box
    xxh3: str


class StoredTensor(msgspec.Struct, frozen=True):
    """A tensor of the source: dtype and shape as in its file, and the view that makes it logical."""

    dtype: str
    shape: tuple[int, ...]
    view: str
    pieces: list[StoredPiece]


class SourceFile(msgspec.Struct, frozen=True):
    """A safetensors file of the source: its header, letter by letter (order and offsets within)."""

    name: str
    header: str


class CarriedFile(msgspec.Struct, frozen=True):
    """Any other file of the source (`name`), kept in the artifact as `stored`."""

    name: str
    stored: str
    num_bytes: int
    xxh3: str


class StoredLayout(msgspec.Struct, frozen=True):
    """The layout that the rank files were cut for."""

    widths: tuple[int, ...]
    layers_per_stage: tuple[int, ...]


class Manifest(msgspec.Struct, frozen=True):
    format: str
    version: int
    layout: StoredLayout
    files: list[StoredFile]
    tensors: dict[str, StoredTensor]
    unused: list[str]
    sources: list[SourceFile]
    carried: list[CarriedFile]


def piece_key(name: str, shape: tuple[int, ...], box: Box) -> str:
    """'q_proj.weight' for a whole tensor, 'q_proj.weight[0:128,0:256]' for a part."""
    if all(edges == (0, size) for edges, size in zip(box, shape, strict=True)):
        return name
    return f"{name}[{','.join(f'{start}:{stop}' for start, stop in box)}]"


def logical_shape(tensor: StoredTensor) -> tuple[int, ...]:
    return View.parse(tensor.view).file_shape(tensor.shape)  # transposing is its own inverse


def chunk_ranges(num_bytes: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_bytes, CHUNK_BYTES):
        yield start, min(num_bytes, start + CHUNK_BYTES)


def write_atomically(path: Path, data: bytes) -> None:
    """All or nothing, and on disk when it returns."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_atomically(folder / MANIFEST_NAME, msgspec.json.format(msgspec.json.encode(manifest), indent=1))


def is_artifact(folder: Path) -> bool:
    return (folder / MANIFEST_NAME).is_file()


def read_manifest(folder: Path) -> Manifest:
    """CheckpointError names the file where it is no manifest of this version."""
    path = folder / MANIFEST_NAME
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path} is no manifest: {error}") from None
    if manifest.format != FORMAT or manifest.version != VERSION:
        raise CheckpointError(
            f"{path} is {manifest.format} version {manifest.version}; this is for {FORMAT} version {VERSION}"
        )
    for name in [file.name for file in manifest.files] + [file.stored for file in manifest.carried]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{path} names {name}, which lies outside the artifact")
    return manifest


def hash_file(path: Path) -> str:
    """xxh3-64 of a whole (small) file."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()
