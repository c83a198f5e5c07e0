"""Streams safetensors files: the header, then every tensor's bytes by slabs, hashed by chunks.

A slab is small enough to stay in the processor's cache between hashing and writing, and is written
from where it is mapped if it lies there in one run: that keeps this close to a plain copy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from bireme.checkpoint.manifest import CHUNK_BYTES, StoredFile, StoredPiece
from bireme.checkpoint.reader import MappedSource, TensorInfo, bits_dtype
from bireme.errors import CheckpointError
from bireme.parallel.boxes import Box, box_shape, full_box, volume
from bireme.parallel.layout import Source, View

SLAB_BYTES = 1024 * 1024
TRANSPOSED_SLAB_BYTES = 8 * 1024 * 1024  # wider, or each cache line of the file is read many times

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Entry:
    """One tensor of a file that is to be written: the logical `box` of `source`."""

    key: str
    source: Source
    box: Box
    dtype: str

    @classmethod
    def whole(cls, name: str, info: TensorInfo) -> Entry:
        return cls(name, Source(name, info.shape), full_box(info.shape), info.dtype)

    @property
    def num_bytes(self) -> int:
        return volume(self.box) * bits_dtype(self.dtype).itemsize


def slabs(box: Box, item_bytes: int, size: int) -> Iterator[Box]:
    """`box` in runs of rows of at most `size` bytes, at least one row each."""
    if not box:
        yield box
        return
    (start, stop), rest = box[0], box[1:]
    rows = max(1, size // max(1, item_bytes * volume(rest)))
    for first in range(start, stop, rows):
        yield ((first, min(stop, first + rows)), *rest)


def slab_bytes(view: View) -> int:
    return TRANSPOSED_SLAB_BYTES if view.kind == "transpose" else SLAB_BYTES


def read_slabs(source: MappedSource, entry: Entry, size: int) -> Iterator[memoryview]:
    """The entry's bytes, in slabs of about `size`; each is valid until the next is asked for."""
    dtype = bits_dtype(entry.dtype)
    buffer = np.empty(0, dtype=dtype)
    for slab in slabs(entry.box, dtype.itemsize, size):
        bits = source.mapped(entry.source, slab)
        if bits is None:
            if buffer.size < volume(slab):
                buffer = np.empty(volume(slab), dtype=dtype)
            bits = buffer[: volume(slab)].reshape(box_shape(slab))
            source.read(entry.source, slab, bits)
        yield bits.reshape(-1).view(np.uint8).data


class _ChunkHasher:
    """xxh3 of every 4 MiB of what it is given."""

    def __init__(self) -> None:
        self._digest, self._room = xxhash.xxh3_64(), CHUNK_BYTES
        self._chunks: list[str] = []

    def update(self, data: memoryview) -> None:
        while data:
            part = data[: self._room]
            self._digest.update(part)
            self._room -= len(part)
            data = data[len(part) :]
            if not self._room:
                self._next()

    def _next(self) -> None:
        self._chunks.append(self._digest.hexdigest())
        self._digest, self._room = xxhash.xxh3_64(), CHUNK_BYTES

    def finish(self) -> list[str]:
        if self._room < CHUNK_BYTES:
            self._next()
        return self._chunks


def make_header(entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> bytes:
    """The header of a file of these tensors, in this order; padded to 8 bytes."""
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for entry in entries:
        stop = at + entry.num_bytes
        table[entry.key] = {
            "dtype": entry.dtype,
            "shape": box_shape(entry.box),
            "data_offsets": [at, stop],
        }
        at = stop
    text = json.dumps(table, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def with_length(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def partial_of(path: Path) -> Path:
    """Where a file lies until it is whole."""
    return path.with_name(path.name + ".partial")


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """`path` appears when `write` has written it whole; CheckpointError where the disk cannot."""
    partial = partial_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            write(file)
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from None


def write_entries(
    path: Path, entries: Sequence[Entry], source: MappedSource, progress: Progress
) -> tuple[StoredFile, list[StoredPiece]]:
    """Streams one safetensors file; returns what the manifest says of it."""
    header = with_length(make_header(entries))
    pieces: list[StoredPiece] = []

    def write(file: BinaryIO) -> None:
        file.write(header)
        for entry in entries:
            hasher = _ChunkHasher()
            for data in read_slabs(source, entry, slab_bytes(entry.source.view)):
                hasher.update(data)
                file.write(data)
                progress(len(data))
            source.forget(entry.source.name)
            pieces.append(StoredPiece(path.name, entry.key, entry.box, hasher.finish()))

    write_file(path, write)
    num_bytes = len(header) + sum(entry.num_bytes for entry in entries)
    return StoredFile(path.name, num_bytes, len(header), xxhash.xxh3_64_hexdigest(header)), pieces
