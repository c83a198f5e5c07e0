"""Reads a sharded checkpoint: any box of any tensor, every covered chunk verified first."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import xxhash

from bireme.checkpoint.manifest import (
    CHUNK_BYTES,
    MANIFEST_NAME,
    Manifest,
    StoredFile,
    StoredPiece,
    chunk_ranges,
    hash_file,
    rank_file_name,
    read_manifest,
)
from bireme.checkpoint.reader import Bits, SafetensorsFile, TensorInfo, bits_dtype, part_of
from bireme.errors import CheckpointError
from bireme.parallel.boxes import (
    Box,
    as_slices,
    box_shape,
    intersect,
    relative,
    union_volume,
    volume,
)
from bireme.parallel.layout import Source, View


@dataclass
class ReadStats:
    """Bytes that were asked for, that lie in the chunks touched, and that were verified."""

    needed: int = 0
    fetched: int = 0
    verified: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, *, needed: int = 0, fetched: int = 0, verified: int = 0) -> None:
        """From any thread."""
        with self._lock:
            self.needed += needed
            self.fetched += fetched
            self.verified += verified


def where(file_name: str, key: str) -> str:
    """'rank 2, layer 5, tensor ...' of a key in a rank's file."""
    rank, layer = re.search(r"rank-(\d+)", file_name), re.search(r"\.(\d+)\.", key)
    parts = [f"rank {int(rank[1])}"] if rank else []
    parts += [f"layer {layer[1]}"] if layer else []
    return ", ".join([*parts, f"tensor {key}"])


class VerifiedFile:
    """A file of an artifact whose chunks are verified when they are first touched.

    `expected` is the dtype and the piece of each tensor that the file must hold.
    """

    def __init__(
        self,
        folder: Path,
        stored: StoredFile,
        expected: Sequence[tuple[str, StoredPiece]],
        stats: ReadStats,
    ) -> None:
        self.stored, self._stats = stored, stats
        self.path = folder / stored.name
        self._pieces = {piece.key: piece for _, piece in expected}
        self._verified: set[tuple[str, int]] = set()
        self._check_header(expected)
        self.file = SafetensorsFile(self.path, self._label)
        if self.file.size != stored.num_bytes:
            raise CheckpointError(
                f"{self.path} has {self.file.size} bytes; the manifest says {stored.num_bytes}"
            )
        for dtype, piece in expected:
            self._check_entry(dtype, piece)
        if extra := sorted(self.file.tensors.keys() - self._pieces.keys()):
            raise CheckpointError(
                f"{self.path} holds {self._label(extra[0])}, which the manifest does not know"
            )

    def _check_entry(self, dtype: str, piece: StoredPiece) -> None:
        label, shape = self._label(piece.key), box_shape(piece.box)
        info = self.file.tensors.get(piece.key)
        if info is None:
            raise CheckpointError(f"{self.path} lacks {label}")
        if (info.dtype, info.shape) != (dtype, shape):
            raise CheckpointError(
                f"{self.path}: {label} is {info.dtype} {list(info.shape)}; "
                f"the manifest says {dtype} {list(shape)}"
            )
        if len(piece.chunks) != -(-(info.stop - info.start) // CHUNK_BYTES):
            raise CheckpointError(
                f"{self.path}: {label} has {info.stop - info.start} bytes; "
                f"the manifest has {len(piece.chunks)} hashes for them"
            )

    def _label(self, key: str) -> str:
        return where(self.stored.name, key)

    def _check_header(self, expected: Sequence[tuple[str, StoredPiece]]) -> None:
        holds = f"{len(expected)} tensors"
        if expected:
            holds += f", {self._label(expected[0][1].key)} the first of them"
        try:
            with self.path.open("rb") as file:
                header = file.read(self.stored.header_bytes)
        except FileNotFoundError:
            raise CheckpointError(f"{self.path} is missing; it holds {holds}") from None
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from None
        if len(header) < self.stored.header_bytes:
            raise CheckpointError(f"{self.path} is cut in its header; it holds {holds}")
        if (found := xxhash.xxh3_64_hexdigest(header)) != self.stored.header_xxh3:
            raise CheckpointError(
                f"{self.path} is corrupt in its header: xxh3 {found}, the manifest says "
                f"{self.stored.header_xxh3}; it holds {holds}"
            )
        self._stats.add(fetched=len(header), verified=len(header))

    def _verify(self, key: str, start: int, stop: int) -> None:
        """Verifies the chunks of a tensor that its bytes [start, stop) lie in."""
        for chunk in range(start // CHUNK_BYTES, -(-stop // CHUNK_BYTES)):
            if (key, chunk) not in self._verified:
                self._verify_chunk(key, chunk)

    def _verify_chunk(self, key: str, chunk: int) -> None:
        info = self.file.tensors[key]
        first = info.start + chunk * CHUNK_BYTES
        last = min(info.stop, first + CHUNK_BYTES)
        found = xxhash.xxh3_64_hexdigest(self.file.raw(first, last))
        self._stats.add(fetched=last - first)
        if (expected := self._pieces[key].chunks[chunk]) != found:
            raise CheckpointError(
                f"{self.path} is corrupt in bytes {first} to {last}: {self._label(key)} "
                f"has xxh3 {found}, the manifest says {expected}"
            )
        self._verified.add((key, chunk))
        self._stats.add(verified=last - first)

    def bits(self, piece: StoredPiece, part: Box) -> Bits:
        """The logical box `part` of a stored piece, its chunks verified, mapped."""
        info = self.file.tensors[piece.key]
        inner = relative(part, piece.box)
        row_bytes = bits_dtype(info.dtype).itemsize * volume(piece.box[1:])
        first, last = inner[0] if inner else (0, 1)
        self._verify(piece.key, first * row_bytes, last * row_bytes)
        return part_of(self.file.bits(piece.key), inner)

    def check(self, progress: Callable[[int], None]) -> Iterator[str]:
        """Verifies every tensor; yields what is wrong, a line a chunk."""
        progress(self.stored.header_bytes)
        for key, info in self.file.tensors.items():
            for start, stop in chunk_ranges(info.stop - info.start):
                try:
                    self._verify(key, start, stop)
                except CheckpointError as error:
                    yield str(error)
                progress(stop - start)
            self.file.forget(key)


class Artifact:
    """A sharded checkpoint as a source of tensors, under the names of its own source.

    Where several files hold the same box, that of `rank` is read, so that at the artifact's own
    layout each rank reads one file. Threads may read at once, each a tensor of its own.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self.stats = ReadStats()
        self._own_name = rank_file_name(rank, sum(self.manifest.layout.widths))
        self._open: dict[str, VerifiedFile] = {}
        self._opening = threading.Lock()

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors of the source, unused ones included (byte ranges are not meaningful here)."""
        return {
            name: TensorInfo(tensor.dtype, tensor.shape, 0, 0)
            for name, tensor in self.manifest.tensors.items()
        }

    @cached_property
    def _stored(self) -> dict[str, tuple[StoredFile, list[tuple[str, StoredPiece]]]]:
        """Each file with the (dtype, piece) of every tensor in it."""
        stored: dict[str, tuple[StoredFile, list[tuple[str, StoredPiece]]]] = {
            file.name: (file, []) for file in self.manifest.files
        }
        for tensor in self.manifest.tensors.values():
            for piece in tensor.pieces:
                stored[piece.file][1].append((tensor.dtype, piece))
        return stored

    def _file(self, name: str) -> VerifiedFile:
        with self._opening:
            if name not in self._open:
                stored, expected = self._stored[name]
                self._open[name] = VerifiedFile(self.folder, stored, expected, self.stats)
            return self._open[name]

    def read(self, source: Source, box: Box, out: Bits) -> None:
        self.stats.add(needed=volume(box) * out.itemsize)
        for piece, part in self._cover(source, box):
            out[as_slices(relative(part, box))] = self._file(piece.file).bits(piece, part)

    def mapped(self, source: Source, box: Box) -> Bits | None:
        cover = self._cover(source, box)
        if len(cover) != 1:
            return None
        bits = self._file(cover[0][0].file).bits(*cover[0])
        if not bits.flags.c_contiguous:
            return None
        self.stats.add(needed=bits.nbytes)
        return bits

    def _cover(self, source: Source, box: Box) -> list[tuple[StoredPiece, Box]]:
        """Stored pieces that hold the box together, and what to take of each: large parts first."""
        tensor = self.manifest.tensors[source.name]
        if View.parse(tensor.view) != source.view or tensor.logical_shape != source.shape:
            raise CheckpointError(
                f"{self.folder}: {source.name} is stored as {tensor.view} {tensor.logical_shape}, "
                f"the model reads it as {source.view} {source.shape}"
            )
        parts = [
            (piece, part)
            for piece in tensor.pieces
            if (part := intersect(piece.box, box)) is not None
        ]
        parts.sort(key=lambda item: (-volume(item[1]), item[0].file != self._own_name))
        chosen: list[tuple[StoredPiece, Box]] = []
        held: set[Box] = set()
        covered, whole = 0, volume(box)
        for piece, part in parts:
            if covered == whole:
                break
            if (more := union_volume(held | {part})) > covered:
                chosen.append((piece, part))
                held.add(part)
                covered = more
        if covered != whole:
            raise CheckpointError(
                f"{self.folder}: {whole - covered} elements of {source.name} are in no file"
            )
        return chosen

    def forget(self, name: str) -> None:
        for piece in self.manifest.tensors[name].pieces:
            if piece.file in self._open:
                self._open[piece.file].file.forget(piece.key)

    def source(self, name: str) -> Source:
        """A tensor as the logical source that it was stored from."""
        tensor = self.manifest.tensors[name]
        return Source(name, tensor.logical_shape, View.parse(tensor.view))

    def file_of(self, name: str) -> Path:
        """A file that holds the tensor or a part of it; the manifest if none does."""
        pieces = self.manifest.tensors[name].pieces
        return self.folder / (pieces[0].file if pieces else MANIFEST_NAME)

    def check_files(self) -> None:
        """Every file is there, whole in size and header; CheckpointError names one that is not."""
        for stored in self.manifest.files:
            self._file(stored.name)

    def check(self, progress: Callable[[int], None] = lambda _: None) -> list[str]:
        """Verifies every byte; returns what is wrong, a line a finding."""
        findings: list[str] = []
        for stored in self.manifest.files:
            try:
                findings += self._file(stored.name).check(progress)
            except CheckpointError as error:
                findings.append(str(error))
                progress(stored.num_bytes)
        for carried in self.manifest.carried:
            path = self.folder / carried.stored
            if not path.is_file():
                findings.append(f"{path} is missing")
            elif (found := hash_file(path)) != carried.xxh3:
                findings.append(
                    f"{path} is corrupt: xxh3 {found}, the manifest says {carried.xxh3}"
                )
        return findings + list(self._uncovered())

    def _uncovered(self) -> Iterator[str]:
        for name, tensor in self.manifest.tensors.items():
            held = {piece.box for piece in tensor.pieces}
            missing = volume(tuple((0, size) for size in tensor.logical_shape)) - union_volume(held)
            if missing:
                yield f"{self.folder}: {missing} elements of {name} are in no file"
