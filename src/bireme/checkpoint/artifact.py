"""Reads a sharded checkpoint: any box of any tensor, every covered chunk verified first."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import xxhash

from bireme.checkpoint.manifest import (
    CHUNK_BYTES,
    Manifest,
    StoredFile,
    chunk_ranges,
    hash_file,
    logical_shape,
    read_manifest,
)
from bireme.checkpoint.reader import Bits, SafetensorsFile, TensorInfo, bits_dtype
from bireme.errors import CheckpointError
from bireme.parallel.layout import (
    Box,
    Source,
    View,
    as_slices,
    box_shape,
    intersect,
    relative,
    union_volume,
    volume,
)


@dataclass
class ReadStats:
    """Bytes that were asked for, that lie in the chunks touched, and that were verified."""

    needed: int = 0
    fetched: int = 0
    verified: int = 0


class VerifiedFile:
    """A file of an artifact whose chunks are verified when they are first touched."""

    def __init__(self, folder: Path, stored: StoredFile, hashes: dict[str, str], stats: ReadStats) -> None:
        self.stored, self._hashes, self._stats = stored, hashes, stats
        self.path = folder / stored.name
        self.file = SafetensorsFile(self.path)
        if self.file.size != stored.num_bytes:
            raise CheckpointError(
                f"{self.path} has {self.file.size} bytes; the manifest says {stored.num_bytes}"
            )
        self._verified: set[int] = set()
        self.verify(0, self.file.data_start)

    def verify(self, start: int, stop: int) -> None:
        """CheckpointError, naming rank, layer and tensor, if a chunk over [start, stop) is corrupt."""
        if stop <= start:
            return
        for chunk in range(start // CHUNK_BYTES, -(-stop // CHUNK_BYTES)):
            if chunk not in self._verified:
                self._verify_chunk(chunk)

    def _verify_chunk(self, chunk: int) -> None:
        first, last = chunk * CHUNK_BYTES, min(self.file.size, (chunk + 1) * CHUNK_BYTES)
        found = xxhash.xxh3_64_hexdigest(self.file.raw(first, last))
        self._stats.fetched += last - first
        if found != self.stored.chunks[chunk]:
            raise CheckpointError(
                f"{self.path} is corrupt in bytes {first} to {last}: xxh3 {found}, the manifest says "
                f"{self.stored.chunks[chunk]}; {self._describe(first, last)}"
            )
        self._verified.add(chunk)
        self._stats.verified += last - first

    def _describe(self, first: int, last: int) -> str:
        """The tensors of the chunk whose own hash is wrong too; there may be several."""
        names = [
            name
            for name, info in self.file.tensors.items()
            if info.start < last
            and first < info.stop
            and xxhash.xxh3_64_hexdigest(self.file.raw(info.start, info.stop)) != self._hashes.get(name)
        ]
        if not names:
            return "in the header"
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f"{where(self.stored.name, names[0])}{more}"

    def bits(self, key: str, box: Box, out_box: Box) -> Bits:
        """The part `out_box` of the stored `box`, its chunks verified, mapped."""
        info = self.file.tensors[key]
        rows = relative(out_box, box)
        item = bits_dtype(info.dtype).itemsize
        row_bytes = (info.stop - info.start) // max(1, info.shape[0]) if info.shape else item
        first, last = (rows[0] if rows else (0, 1))
        self.verify(info.start + first * row_bytes, info.start + last * row_bytes)
        self._stats.needed += volume(out_box) * item
        return self.file.bits(key)[as_slices(rows)]


def where(file_name: str, key: str) -> str:
    """'rank 2, layer 5, tensor ...' of a key in a rank's file."""
    rank, layer = re.search(r"rank-(\d+)", file_name), re.search(r"\.(\d+)\.", key)
    parts = [f"rank {int(rank[1])}"] if rank else []
    parts += [f"layer {layer[1]}"] if layer else []
    return ", ".join([*parts, f"tensor {key}"])


class Artifact:
    """A sharded checkpoint as a source of tensors, under the names of its own source."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self.stats = ReadStats()
        self._stored = {file.name: file for file in self.manifest.files}
        self._open: dict[str, VerifiedFile] = {}

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors of the source, unused ones included (byte ranges are not meaningful here)."""
        return {
            name: TensorInfo(tensor.dtype, tensor.shape, 0, 0) for name, tensor in self.manifest.tensors.items()
        }

    def file(self, name: str) -> VerifiedFile:
        if name not in self._open:
            if name not in self._stored:
                raise CheckpointError(f"{self.folder}: the manifest has no file {name}")
            hashes = {
                piece.key: piece.xxh3
                for tensor in self.manifest.tensors.values()
                for piece in tensor.pieces
                if piece.file == name
            }
            self._open[name] = VerifiedFile(self.folder, self._stored[name], hashes, self.stats)
        return self._open[name]

    def read(self, source: Source, box: Box, out: Bits) -> None:
        tensor = self.manifest.tensors[source.name]
        if View.parse(tensor.view) != source.view:
            raise CheckpointError(
                f"{self.folder}: {source.name} is stored as {tensor.view}, the model reads it as {source.view}"
            )
        pieces = {piece.box: piece for piece in reversed(tensor.pieces)}
        common = {where: part for where in pieces if (part := intersect(where, box)) is not None}
        if box in common.values():  # one stored piece holds it all
            common = dict([next(item for item in common.items() if item[1] == box)])
        for stored_box, part in common.items():
            piece = pieces[stored_box]
            out[as_slices(relative(part, box))] = self.file(piece.file).bits(piece.key, stored_box, part)
        covered = union_volume(set(common.values()))
        if covered != volume(box):
            raise CheckpointError(
                f"{self.folder}: {volume(box) - covered} of {volume(box)} elements of {source.name} are in no file"
            )

    def forget(self, name: str) -> None:
        for piece in self.manifest.tensors[name].pieces:
            if piece.file in self._open:
                self._open[piece.file].file.forget(piece.key)

    def check_files(self) -> None:
        """Every file is there and has its size; CheckpointError names the one that does not."""
        for stored in self.manifest.files:
            self.file(stored.name)

    def check(self, progress: Callable[[int], None] = lambda _: None) -> list[str]:
        """Verifies every byte; returns what is wrong, a line a finding."""
        findings = []
        for stored in self.manifest.files:
            try:
                file = self.file(stored.name)
            except CheckpointError as error:
                findings.append(str(error))
                continue
            for first, last in chunk_ranges(stored.num_bytes):
                try:
                    file.verify(first, last)
                except CheckpointError as error:
                    findings.append(str(error))
                progress(last - first)
        for carried in self.manifest.carried:
            path = self.folder / carried.stored
            if not path.is_file():
                findings.append(f"{path} is missing")
            elif hash_file(path) != carried.xxh3:
                findings.append(f"{path} is corrupt: its xxh3 is not the manifest's {carried.xxh3}")
        return findings + self._uncovered()

    def _uncovered(self) -> list[str]:
        findings = []
        for name, tensor in self.manifest.tensors.items():
            if tensor.pieces and not all(piece.file in self._stored for piece in tensor.pieces):
                findings.append(f"{self.folder}: {name} lies in a file that the manifest does not list")
            elif not tensor.pieces:
                findings.append(f"{self.folder}: {name} lies nowhere")
            for piece in tensor.pieces:
                file = self._open.get(piece.file)
                info = file.file.tensors.get(piece.key) if file else None
                if file and (info is None or info.shape != box_shape(piece.box) or info.dtype != tensor.dtype):
                    findings.append(f"{file.path}: {where(piece.file, piece.key)} is not as the manifest says")
        return findings

    def source(self, name: str) -> Source:
        """The stored tensor as a logical source."""
        tensor = self.manifest.tensors[name]
        return Source(name, logical_shape(tensor), View.parse(tensor.view))
