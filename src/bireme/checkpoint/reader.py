"""Reads boxes of tensors from safetensors files, as bits: no dtype is interpreted here.

Source of the format: https://github.com/huggingface/safetensors (8 bytes of header length, JSON,
data without holes). Files are mapped; a reader touches the pages of the boxes that it is asked for.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from bireme.checkpoint.files import PICKLED, SAFETENSORS
from bireme.errors import CheckpointError
from bireme.parallel.boxes import Box, as_slices, box_shape
from bireme.parallel.layout import Source

Bits = NDArray[np.unsignedinteger[Any]]

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_MAX_HEADER_BYTES = 100_000_000


def bits_dtype(dtype: str) -> np.dtype[Any]:
    """The unsigned integer type that holds one element's bits."""
    return np.dtype(_BITS[ITEM_BYTES[dtype]])


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a file: safetensors dtype name, shape as in the file, byte range of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorSource(Protocol):
    """Where tensors come from: a checkpoint, an artifact, or made-up numbers."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, under its name and in its shape as in the source's files."""
        ...

    def read(self, source: Source, box: Box, out: Bits) -> None:
        """Fills `out` with the logical `box` of a tensor; `source.name` is as in the file."""
        ...

    def forget(self, name: str) -> None:
        """The tensor is not needed soon: drops its mapped pages from this process."""
        ...


class MappedSource(TensorSource, Protocol):
    """A source whose tensors lie in mapped files."""

    def mapped(self, source: Source, box: Box) -> Bits | None:
        """The logical `box` where it lies; None unless it lies there in one run of bytes."""
        ...


_Count = Annotated[int, msgspec.Meta(ge=0)]


class HeaderEntry(msgspec.Struct):
    dtype: str
    shape: tuple[_Count, ...]
    data_offsets: tuple[_Count, _Count]


def parse_header(header: bytes) -> dict[str, HeaderEntry]:
    """The tensors of a file in the order of their bytes."""
    table = msgspec.json.decode(header.decode(), type=dict[str, msgspec.Raw])
    table.pop("__metadata__", None)
    entries = [
        (name, msgspec.json.decode(entry, type=HeaderEntry)) for name, entry in table.items()
    ]
    return dict(sorted(entries, key=lambda item: item[1].data_offsets))


class SafetensorsFile:
    """One file: its header, checked, and its data, mapped.

    `label` says for errors what a tensor is called: 'rank 2, layer 5, tensor ...' in an artifact.
    """

    def __init__(self, path: Path, label: Callable[[str], str] = str) -> None:
        self.path, self._label = path, label
        try:
            with path.open("rb") as file:
                self.size = file.seek(0, 2)
                file.seek(0)
                self.header = self._read_header(file)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        self.tensors = self._parse()

    def _read_header(self, file: BinaryIO) -> bytes:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, self.size - 8):
            raise CheckpointError(
                f"{self.path} is cut, or no safetensors file: "
                f"it states a header of {length} bytes and has {self.size} bytes in all"
            )
        return file.read(length)

    @property
    def data_start(self) -> int:
        return 8 + len(self.header)

    def _parse(self) -> dict[str, TensorInfo]:
        try:
            entries = parse_header(self.header)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.path} has a broken header: {error}") from None
        at = self.data_start
        for name, entry in entries.items():
            self._check(name, entry, at)
            at = self.data_start + entry.data_offsets[1]
        if at != self.size:
            raise CheckpointError(f"{self.path} has {self.size} bytes; its tensors end at {at}")
        return {
            name: TensorInfo(
                entry.dtype,
                entry.shape,
                self.data_start + entry.data_offsets[0],
                self.data_start + entry.data_offsets[1],
            )
            for name, entry in entries.items()
        }

    def _check(self, name: str, entry: HeaderEntry, at: int) -> None:
        """The entry is sound and its bytes begin at `at`, where the one before it ended."""
        first, last = (self.data_start + offset for offset in entry.data_offsets)
        label = self._label(name)
        if entry.dtype not in ITEM_BYTES:
            raise CheckpointError(f"{self.path}: {label} has the unknown dtype {entry.dtype}")
        needed = math.prod(entry.shape) * ITEM_BYTES[entry.dtype]
        if last - first != needed:
            raise CheckpointError(
                f"{self.path}: {label} of shape {list(entry.shape)} and dtype {entry.dtype} "
                f"needs {needed} bytes, not {last - first}"
            )
        if last > self.size:
            raise CheckpointError(
                f"{self.path} is cut: {label} ends at byte {last}, the file at {self.size}"
            )
        if first != at:
            raise CheckpointError(f"{self.path}: {label} begins at byte {first}, not at {at}")

    def bits(self, name: str) -> Bits:
        """The whole tensor's bits, mapped, not read."""
        info = self.tensors[name]
        array = np.frombuffer(self._map, bits_dtype(info.dtype), math.prod(info.shape), info.start)
        return array.reshape(info.shape)

    def raw(self, start: int, stop: int) -> memoryview:
        """The file's bytes [start, stop), mapped."""
        return memoryview(self._map)[start:stop]

    def forget(self, name: str) -> None:
        """Drops the tensor's pages from this process (they stay in the page cache)."""
        info = self.tensors[name]
        first = info.start // mmap.PAGESIZE * mmap.PAGESIZE
        if info.stop > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, info.stop - first)


def part_of(bits: Bits, box: Box) -> Bits:
    """The view of a box; of a scalar, too."""
    index: tuple[Any, ...] = (..., *as_slices(box))
    part: Bits = bits[index]
    return part


def copy_view(bits: Bits, source: Source, box: Box, out: Bits) -> None:
    """Copies the logical `box` of a tensor whose bits are as in its file into `out`."""
    assert out.shape == box_shape(box)
    for file_box, target in source.view.file_boxes(box, source.shape):
        part = bits[as_slices(file_box)]
        out[as_slices(target)] = part.T if source.view.kind == "transpose" else part


def mapped_part(bits: Bits, source: Source, box: Box) -> Bits | None:
    """The logical `box` within a tensor's bits as in its file, if it is one run of them."""
    if source.view.kind != "identity":
        return None
    part = part_of(bits, box)
    return part if part.flags.c_contiguous else None


class Checkpoint:
    """A folder with a Hugging Face checkpoint in one or many safetensors files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = [SafetensorsFile(path) for path in _weight_files(folder)]
        self._home: dict[str, SafetensorsFile] = {}
        for file in self.files:
            for name in file.tensors:
                if name in self._home:
                    first = self._home[name].path.name
                    raise CheckpointError(f"{folder} holds {name} in {first} and {file.path.name}")
                self._home[name] = file

    @property
    def weight_files(self) -> list[Path]:
        return [file.path for file in self.files]

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: info for file in self.files for name, info in file.tensors.items()}

    def file_of(self, name: str) -> Path:
        return self._home[name].path

    def read(self, source: Source, box: Box, out: Bits) -> None:
        copy_view(self._home[source.name].bits(source.name), source, box, out)

    def mapped(self, source: Source, box: Box) -> Bits | None:
        return mapped_part(self._home[source.name].bits(source.name), source, box)

    def forget(self, name: str) -> None:
        self._home[name].forget(name)


def _weight_files(folder: Path) -> list[Path]:
    if files := SAFETENSORS.inside(folder):
        return files
    if PICKLED.inside(folder):
        raise CheckpointError(
            f"{folder} holds .bin files only; `bireme shard {folder} OUT` reads those"
        )
    raise CheckpointError(f"{folder} has no safetensors file; it is no checkpoint")
