"""Reads boxes of tensors from safetensors files, as bits: no dtype is interpreted here.

Source of the format: https://github.com/huggingface/safetensors (8 bytes of header length, JSON,
data without holes). Files are mapped; a reader touches the pages of the boxes that it is asked for.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bireme.errors import CheckpointError
from bireme.model_config import read_json
from bireme.parallel.layout import Box, Source, as_slices, box_shape

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


class SafetensorsFile:
    """One file: its header, checked, and its data, mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = file.seek(0, 2)
                file.seek(0)
                self.header = self._read_header(file.read(8), file)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        self.tensors = self._parse()

    def _read_header(self, prefix: bytes, file: Any) -> bytes:
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, self.size - 8):
            raise CheckpointError(
                f"{self.path} is no safetensors file: it states a header of {length} bytes in {self.size}"
            )
        return bytes(file.read(length))

    @property
    def data_start(self) -> int:
        return 8 + len(self.header)

    def _parse(self) -> dict[str, TensorInfo]:
        try:
            entries = json.loads(self.header)
            entries.pop("__metadata__", None)
            tensors = {
                name: TensorInfo(
                    entry["dtype"],
                    tuple(entry["shape"]),
                    self.data_start + entry["data_offsets"][0],
                    self.data_start + entry["data_offsets"][1],
                )
                for name, entry in entries.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{self.path} has a broken header: {error!r}") from None
        for name, info in tensors.items():
            if info.dtype not in ITEM_BYTES:
                raise CheckpointError(f"{self.path}: {name} has the unknown dtype {info.dtype}")
            need = math.prod(info.shape) * ITEM_BYTES[info.dtype]
            if info.stop - info.start != need or info.start < self.data_start:
                raise CheckpointError(f"{self.path}: {name} of shape {info.shape} needs {need} bytes, not {info.stop - info.start}")
            if info.stop > self.size:
                raise CheckpointError(
                    f"{self.path} is cut: {name} ends at byte {info.stop}, the file at {self.size}"
                )
        return tensors

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


def copy_view(bits: Bits, source: Source, box: Box, out: Bits) -> None:
    """Copies the logical `box` of a tensor whose bits are as in its file into `out`."""
    for file_box, target in source.view.file_boxes(box, source.shape):
        part = bits[as_slices(file_box)]
        out[as_slices(target)] = part.T if source.view.kind == "transpose" else part


class Checkpoint:
    """A folder with a Hugging Face checkpoint in one or many safetensors files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = [SafetensorsFile(folder / name) for name in self._file_names()]
        self._home = {name: file for file in self.files for name in file.tensors}
        if len(self._home) != sum(len(file.tensors) for file in self.files):
            raise CheckpointError(f"{folder} holds a tensor in two files")

    def _file_names(self) -> list[str]:
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{index} has no weight_map")
            return sorted(set(weight_map.values()))
        names = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if "model.safetensors" in names:
            return ["model.safetensors"]
        if not names and any(self.folder.glob("*.bin")):
            raise CheckpointError(f"{self.folder} holds .bin files only; `bireme shard` reads those")
        if not names:
            raise CheckpointError(f"{self.folder} has no safetensors file; it is no checkpoint")
        return names

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: info for file in self.files for name, info in file.tensors.items()}

    def file_of(self, name: str) -> SafetensorsFile:
        return self._home[name]

    def read(self, source: Source, box: Box, out: Bits) -> None:
        assert out.shape == box_shape(box)
        copy_view(self._home[source.name].bits(source.name), source, box, out)

    def forget(self, name: str) -> None:
        self._home[name].forget(name)
