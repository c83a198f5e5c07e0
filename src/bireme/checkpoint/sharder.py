"""Writes sharded checkpoints and turns them back into their source, byte for byte.

Everything streams: a file's header, then its boxes in slabs. A rank's file is renamed into place
when it is whole, with a note of its hashes; an interrupted run verifies those and goes on. The
manifest comes last.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import msgspec
import numpy as np
import xxhash

from bireme.checkpoint.artifact import Artifact
from bireme.checkpoint.manifest import (
    CHUNK_BYTES,
    FORMAT,
    MANIFEST_NAME,
    UNUSED_NAME,
    VERSION,
    CarriedFile,
    Manifest,
    SourceFile,
    StoredFile,
    StoredLayout,
    StoredPiece,
    StoredTensor,
    chunk_ranges,
    hash_file,
    piece_key,
    write_atomically,
    write_manifest,
)
from bireme.checkpoint.names import NameMap
from bireme.checkpoint.reader import Checkpoint, TensorInfo, TensorSource, bits_dtype
from bireme.errors import CheckpointError
from bireme.parallel.layout import Box, ModelLayout, Source, as_slices, box_shape, full_box, volume

SLAB_BYTES = 16 * 1024 * 1024
_FOREIGN_WEIGHTS = {".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".safetensors"}

Progress = Callable[[int], None]


class ShardableSource(TensorSource, Protocol):
    """A source that can also say what else it is made of."""

    folder: Path

    def forget(self, name: str) -> None:
        """Drops the tensor's pages from this process."""
        ...


@dataclass(frozen=True)
class Entry:
    """One tensor of a file that is to be written."""

    key: str
    source: Source
    box: Box
    dtype: str

    @property
    def num_bytes(self) -> int:
        return volume(self.box) * bits_dtype(self.dtype).itemsize


class _Finished(msgspec.Struct, frozen=True):
    """Left beside a finished file until the manifest is written."""

    job: str
    file: StoredFile
    hashes: dict[str, str]


class _HashedWriter:
    """Writes bytes, hashing every 4 MiB of them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest, self._room = xxhash.xxh3_64(), CHUNK_BYTES
        self.chunks: list[str] = []
        self.num_bytes = 0

    def write(self, data: memoryview) -> None:
        self._file.write(data)
        self.num_bytes += len(data)
        while len(data):
            part = data[: self._room]
            self._digest.update(part)
            self._room -= len(part)
            data = data[len(part) :]
            if not self._room:
                self._next_chunk()

    def _next_chunk(self) -> None:
        self.chunks.append(self._digest.hexdigest())
        self._digest, self._room = xxhash.xxh3_64(), CHUNK_BYTES

    def finish(self) -> None:
        if self._room < CHUNK_BYTES:
            self._next_chunk()


def slabs(box: Box, item_bytes: int) -> Iterator[Box]:
    """`box` in runs of rows of at most about 16 MiB."""
    if not box:
        yield box
        return
    (start, stop), rest = box[0], box[1:]
    rows = max(1, SLAB_BYTES // max(1, item_bytes * volume(rest)))
    for first in range(start, stop, rows):
        yield ((first, min(stop, first + rows)), *rest)


def _header(entries: list[Entry]) -> bytes:
    table: dict[str, Any] = {}
    at = 0
    for entry in entries:
        stop = at + entry.num_bytes
        table[entry.key] = {"dtype": entry.dtype, "shape": box_shape(entry.box), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(table, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _write_file(path: Path, entries: list[Entry], source: ShardableSource, progress: Progress) -> tuple[StoredFile, dict[str, str]]:
    """Streams one safetensors file; returns its hashes by chunk and by tensor."""
    partial = path.with_name(path.name + ".partial")
    header, hashes = _header(entries), {}
    buffer = np.empty(SLAB_BYTES, dtype=np.uint8)
    with partial.open("wb", buffering=0) as file:
        writer = _HashedWriter(file)
        writer.write(memoryview(len(header).to_bytes(8, "little") + header))
        for entry in entries:
            digest = xxhash.xxh3_64()
            dtype = bits_dtype(entry.dtype)
            for slab in slabs(entry.box, dtype.itemsize):
                num_bytes = volume(slab) * dtype.itemsize
                space = buffer if num_bytes <= SLAB_BYTES else np.empty(num_bytes, dtype=np.uint8)
                out = space[:num_bytes].view(dtype).reshape(box_shape(slab))
                source.read(entry.source, slab, out)
                data = memoryview(space)[:num_bytes]
                digest.update(data)
                writer.write(data)
                progress(num_bytes)
            hashes[entry.key] = digest.hexdigest()
            source.forget(entry.source.name)
        writer.finish()
        os.fsync(file.fileno())
    partial.replace(path)
    return StoredFile(path.name, writer.num_bytes, writer.chunks), hashes


def rank_file_name(rank: int, world_size: int) -> str:
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


@dataclass(frozen=True)
class ShardPlan:
    """What `shard` will write: the entries of each file."""

    files: dict[str, list[Entry]]

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entries in self.files.values() for entry in entries)


def plan_shards(layout: ModelLayout, names: NameMap, tensors: dict[str, TensorInfo]) -> ShardPlan:
    """One file a rank with the boxes that it holds, and one with the tensors that nobody needs."""
    files: dict[str, list[Entry]] = {}
    for rank in layout.ranks:
        entries = []
        for blocks in rank.blocks().values():
            for source, box in blocks:
                there = names.source(source)
                key = piece_key(there.name, there.shape, box)
                entries.append(Entry(key, there, box, tensors[there.name].dtype))
        files[rank_file_name(rank.rank, len(layout.ranks))] = entries
    if names.unused:
        files[UNUSED_NAME] = [
            Entry(name, Source(name, tensors[name].shape), full_box(tensors[name].shape), tensors[name].dtype)
            for name in names.unused
        ]
    return ShardPlan(files)


def shard(
    source: ShardableSource,
    out: Path,
    layout: ModelLayout,
    names: NameMap,
    progress: Progress = lambda _: None,
) -> Manifest:
    """Writes `source`, a checkpoint or an artifact, as an artifact of `layout` in the folder `out`.

    CheckpointError if `out` holds anything but an interrupted run of the same job.
    """
    plan = plan_shards(layout, names, dict(source.tensors))
    sources, carried = _origin(source)
    job = _fingerprint(plan, sources, carried)
    _prepare_folder(out, source.folder, plan, [name for name, _ in carried])
    stored, hashes = [], {}
    for name, entries in plan.files.items():
        finished = _resume(out / name, job, progress) or _finish(out / name, job, entries, source, progress)
        stored.append(finished.file)
        hashes[name] = finished.hashes
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        layout=_stored_layout(layout),
        files=stored,
        tensors=_stored_tensors(plan, dict(source.tensors), hashes),
        unused=list(names.unused),
        sources=sources,
        carried=[_carry(path, name, out) for name, path in carried],
    )
    write_manifest(out, manifest)
    for name in plan.files:
        _note_path(out / name).unlink()
    return manifest


def _stored_layout(layout: ModelLayout) -> StoredLayout:
    bounds = {rank.stage: rank.layers for rank in layout.ranks}
    return StoredLayout(layout.widths, tuple(stop - start for start, stop in bounds.values()))


def _stored_tensors(
    plan: ShardPlan, tensors: dict[str, TensorInfo], hashes: dict[str, dict[str, str]]
) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    for file, entries in plan.files.items():
        for entry in entries:
            info, name = tensors[entry.source.name], entry.source.name
            tensor = stored.setdefault(name, StoredTensor(info.dtype, info.shape, str(entry.source.view), []))
            tensor.pieces.append(StoredPiece(file, entry.key, entry.box, hashes[file][entry.key]))
    return stored


def _note_path(path: Path) -> Path:
    return path.with_suffix(".finished.json")


def _finish(path: Path, job: str, entries: list[Entry], source: ShardableSource, progress: Progress) -> _Finished:
    stored, hashes = _write_file(path, entries, source, progress)
    finished = _Finished(job, stored, hashes)
    write_atomically(_note_path(path), msgspec.json.encode(finished))
    return finished


def _resume(path: Path, job: str, progress: Progress) -> _Finished | None:
    """The note of a file that an interrupted run of the same job finished, if its bytes still hold."""
    try:
        finished = msgspec.json.decode(_note_path(path).read_bytes(), type=_Finished)
        if finished.job != job or path.stat().st_size != finished.file.num_bytes:
            return None
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    with path.open("rb") as file:
        for (first, last), expected in zip(
            chunk_ranges(finished.file.num_bytes), finished.file.chunks, strict=True
        ):
            if xxhash.xxh3_64_hexdigest(file.read(last - first)) != expected:
                return None
    progress(sum(last - first for first, last in chunk_ranges(finished.file.num_bytes)))
    return finished


def _origin(source: ShardableSource) -> tuple[list[SourceFile], list[tuple[str, Path]]]:
    """What the source must be turned back into: its safetensors headers and its other files."""
    if isinstance(source, Artifact):
        manifest = source.manifest
        return manifest.sources, [(file.name, source.folder / file.stored) for file in manifest.carried]
    if isinstance(source, Checkpoint):
        headers = [SourceFile(file.path.name, file.header.decode()) for file in source.files]
    else:
        headers = [_made_header(source)]
    return headers, [(str(path.relative_to(source.folder)), path) for path in _other_files(source.folder)]


def _made_header(source: ShardableSource) -> SourceFile:
    """For a source that is not safetensors (`.bin`): it comes back as one safetensors file."""
    entries = [
        Entry(name, Source(name, info.shape), full_box(info.shape), info.dtype)
        for name, info in source.tensors.items()
    ]
    return SourceFile("model.safetensors", _header(entries).decode())


def _other_files(folder: Path) -> list[Path]:
    """Files that are no weights (of any format), hidden folders left out."""
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.suffix not in _FOREIGN_WEIGHTS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts[:-1])
    ]
    return [path for path in found if path.name != "pytorch_model.bin.index.json"]


def _carry(path: Path, name: str, out: Path) -> CarriedFile:
    """Copies a file; the index of a multi-file source goes aside, since it does not describe `out`."""
    stored = f"source/{name}" if name.endswith(".index.json") or name == MANIFEST_NAME else name
    target = out / stored
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)
    return CarriedFile(name, stored, target.stat().st_size, hash_file(target))


def _fingerprint(plan: ShardPlan, sources: list[SourceFile], carried: list[tuple[str, Path]]) -> str:
    """The identity of a job: the same source cut the same way."""
    digest = xxhash.xxh3_64()
    for source in sources:
        digest.update(source.name + source.header)
    for name, entries in plan.files.items():
        digest.update(name + ",".join(entry.key for entry in entries))
    for name, path in carried:
        stat = path.stat()
        digest.update(f"{name}:{stat.st_size}")
    return digest.hexdigest()


def _prepare_folder(out: Path, source: Path, plan: ShardPlan, carried: list[str]) -> None:
    if out.resolve() == source.resolve():
        raise CheckpointError(f"{out} is the source itself; give another folder")
    if (out / MANIFEST_NAME).exists():
        raise CheckpointError(f"{out} already holds a finished artifact; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    ours = {name for name in plan.files} | {_note_path(Path(name)).name for name in plan.files}
    ours |= {f"{name}.partial" for name in ours} | {f"{MANIFEST_NAME}.partial", "source"}
    ours |= {Path(name).parts[0] for name in carried}
    if foreign := sorted(path.name for path in out.iterdir() if path.name not in ours):
        raise CheckpointError(f"{out} is not empty ({foreign[0]} is there); give a new or an empty folder")
    needed, free = plan.num_bytes, shutil.disk_usage(out).free
    present = sum((out / name).stat().st_size for name in plan.files if (out / name).exists())
    if needed - present > free:
        raise CheckpointError(f"{out} has {free} bytes free; {needed - present} more are needed")


def export(artifact: Artifact, out: Path, progress: Progress = lambda _: None) -> None:
    """Writes the artifact's source back into the new folder `out`, every file byte for byte."""
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty; give a new or an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    for carried in artifact.manifest.carried:
        target = out / carried.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact.folder / carried.stored, target)
        if hash_file(target) != carried.xxh3:
            raise CheckpointError(f"{artifact.folder / carried.stored} is corrupt: its xxh3 is not {carried.xxh3}")
    for source in artifact.manifest.sources:
        _export_file(artifact, source, out / source.name, progress)


def _export_file(artifact: Artifact, source: SourceFile, path: Path, progress: Progress) -> None:
    entries = json.loads(source.header)
    entries.pop("__metadata__", None)
    header = source.header.encode()
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb", buffering=0) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in sorted(entries, key=lambda name: tuple(entries[name]["data_offsets"])):
            for data in _file_slabs(artifact, name):
                file.write(data)
                progress(len(data))
            artifact.forget(name)
        os.fsync(file.fileno())
    partial.replace(path)


def _file_slabs(artifact: Artifact, name: str) -> Iterator[memoryview]:
    """The bytes of a tensor as in its file; a view other than identity needs the tensor in memory."""
    info, source = artifact.tensors[name], artifact.source(name)
    dtype = bits_dtype(info.dtype)
    whole = None if source.view.kind == "identity" else np.empty(info.shape, dtype=dtype)
    for slab in slabs(full_box(source.shape), dtype.itemsize):
        rows = np.empty(box_shape(slab), dtype=dtype)
        artifact.read(source, slab, rows)
        if whole is None:
            yield memoryview(rows.reshape(-1).view(np.uint8))
            continue
        for file_box, inner in source.view.file_boxes(slab, source.shape):
            part = rows[as_slices(inner)]
            whole[as_slices(file_box)] = part.T if source.view.kind == "transpose" else part
    if whole is not None:
        yield memoryview(whole.reshape(-1).view(np.uint8))
