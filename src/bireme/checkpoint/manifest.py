"""The manifest of a sharded checkpoint: what lies where, how to trust it, how to undo it.

An artifact is a folder with one safetensors file a rank (boxes of logical tensors), one of `unused`
tensors, copies of the source's other files, and `manifest.json`, which is written last and carries
a hash of itself. Hashes are xxh3-64 in hexadecimal; a tensor's bytes are hashed by chunks of 4 MiB
counted from its own start, so that no chunk belongs to two tensors and each can be blamed.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import xxhash

from bireme.checkpoint.files import SAFETENSORS, is_inside
from bireme.checkpoint.reader import ITEM_BYTES
from bireme.errors import CheckpointError
from bireme.parallel.boxes import Box, full_box, intersect
from bireme.parallel.layout import View

FORMAT = "bireme-sharded-checkpoint"
VERSION = 1
CHUNK_BYTES = 4 * 1024 * 1024
MANIFEST_NAME = "manifest.json"
UNUSED_NAME = "unused.safetensors"
_RANK_FILE = re.compile(r"rank-\d{5}-of-\d{5}\.safetensors")


class StoredFile(msgspec.Struct, frozen=True):
    """A safetensors file of the artifact; its first `header_bytes` hash to `header_xxh3`."""

    name: str
    num_bytes: int
    header_bytes: int
    header_xxh3: str


class StoredPiece(msgspec.Struct, frozen=True):
    """`box` of the logical tensor is the tensor `key` of `file`; `chunks` hash its bytes."""

    file: str
    key: str
    box: Box
    chunks: list[str]


class StoredTensor(msgspec.Struct, frozen=True):
    """A tensor of the source: dtype and shape as in its file, the view that makes it logical."""

    dtype: str
    shape: tuple[int, ...]
    view: str
    pieces: list[StoredPiece]

    @property
    def logical_shape(self) -> tuple[int, ...]:
        return View.parse(self.view).file_shape(self.shape)  # transposing is its own inverse


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


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """`xxh3` is that of this manifest's compact JSON with an empty `xxh3`."""

    format: str = FORMAT
    version: int = VERSION
    xxh3: str = ""
    layout: StoredLayout
    files: list[StoredFile]
    tensors: dict[str, StoredTensor]
    unused: list[str]
    sources: list[SourceFile]
    carried: list[CarriedFile]

    def own_hash(self) -> str:
        blank = msgspec.structs.replace(self, xxh3="")
        return xxhash.xxh3_64_hexdigest(msgspec.json.encode(blank))

    @property
    def num_source_bytes(self) -> int:
        """Bytes of the source's tensors: what `export` writes, headers and other files apart."""
        return sum(
            ITEM_BYTES[tensor.dtype] * math.prod(tensor.shape) for tensor in self.tensors.values()
        )


class _Head(msgspec.Struct):
    """What every version of a manifest begins with."""

    format: str
    version: int


def piece_key(name: str, shape: tuple[int, ...], box: Box) -> str:
    """'q_proj.weight' for a whole tensor, 'q_proj.weight[0:128,0:256]' for a part."""
    if box == full_box(shape):
        return name
    return f"{name}[{','.join(f'{start}:{stop}' for start, stop in box)}]"


def rank_file_name(rank: int, world_size: int) -> str:
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def check_not_broken(folder: Path) -> None:
    """CheckpointError if the folder's weights are files of an artifact, and no manifest is there."""
    for path in SAFETENSORS.inside(folder):
        if _RANK_FILE.fullmatch(path.name) and not is_artifact(folder):
            raise CheckpointError(
                f"{folder / MANIFEST_NAME} is missing or broken, though {path.name} is there: "
                "this was a sharded artifact; shard its source again"
            )


def _check_is_artifact(folder: Path) -> None:
    if not folder.is_dir():
        what = "a file" if folder.exists() else "no folder"
        raise CheckpointError(f"{folder} is {what}; give a folder that `bireme shard` wrote")
    check_not_broken(folder)
    if not is_artifact(folder):
        raise CheckpointError(
            f"{folder} is no sharded artifact; give a folder that `bireme shard` wrote"
        )


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


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Writes the manifest with its hash, and returns it so."""
    signed = msgspec.structs.replace(manifest, xxh3=manifest.own_hash())
    text = msgspec.json.format(msgspec.json.encode(signed), indent=1)
    write_atomically(folder / MANIFEST_NAME, text)
    return signed


def is_artifact(folder: Path) -> bool:
    """True if there is a manifest of ours, of whatever version, damaged or not."""
    try:
        with (folder / MANIFEST_NAME).open("rb") as file:
            return FORMAT.encode() in file.read(256)
    except OSError:
        return False


def read_manifest(folder: Path) -> Manifest:
    """CheckpointError names the file if it is no manifest of this version, damaged or nonsense."""
    _check_is_artifact(folder)
    path = folder / MANIFEST_NAME
    try:
        data = path.read_bytes()
        head = msgspec.json.decode(data, type=_Head)
        if (head.format, head.version) != (FORMAT, VERSION):
            raise CheckpointError(
                f"{path} is {head.format} version {head.version}; "
                f"this release reads {FORMAT} version {VERSION}"
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no manifest: {error}") from None
    if (found := manifest.own_hash()) != manifest.xxh3:
        raise CheckpointError(f"{path} is corrupt: its xxh3 is {found}, not {manifest.xxh3}")
    for problem in _problems(manifest):
        raise CheckpointError(f"{path} {problem}")
    return manifest


def _problems(manifest: Manifest) -> Iterator[str]:
    """What no manifest of ours says: paths that leave the folder, boxes that leave their tensor."""
    names = [file.name for file in manifest.files] + [file.name for file in manifest.sources]
    names += [name for file in manifest.carried for name in (file.name, file.stored)]
    for name in names:
        if not is_inside(name):
            yield f"names {name}, which lies outside the artifact"
    files = {file.name for file in manifest.files}
    for name, tensor in manifest.tensors.items():
        if tensor.dtype not in ITEM_BYTES:
            yield f"gives {name} the unknown dtype {tensor.dtype}"
        if not re.fullmatch(r"identity|transpose|interleave:[1-9]\d*:[1-9]\d*", tensor.view):
            yield f"gives {name} the unknown view {tensor.view}"
        whole = full_box(tensor.logical_shape)
        for piece in tensor.pieces:
            if piece.file not in files:
                yield f"puts {name} into {piece.file}, which it does not list"
            if piece.box != whole and not _is_part(piece.box, whole):
                yield f"gives {name} of shape {list(tensor.shape)} a piece at {piece.box}"


def _is_part(box: Box, whole: Box) -> bool:
    return len(box) == len(whole) and intersect(box, whole) == box


def hash_file(path: Path) -> str:
    """xxh3-64 of a whole file."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()
