"""Reads `.bin` checkpoints (zip or the older format of torch.save), for `bireme shard` alone.

Unpickling is restricted to tensors (`weights_only=True`): a file that asks for more is refused. A
zip file is mapped, and mapped anew when much of it was read, so that its pages do not pile up; one
in the older format (torch before 1.6) cannot be mapped and lies in memory while it is read.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import torch

from bireme.checkpoint.files import PICKLED
from bireme.checkpoint.reader import Bits, TensorInfo, bits_dtype, copy_view, mapped_part
from bireme.errors import CheckpointError
from bireme.parallel.boxes import Box
from bireme.parallel.layout import Source

_MAX_MAPPED_BYTES = 64 * 1024 * 1024
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class PickledCheckpoint:
    """A folder with `pytorch_model.bin`, or with several such files and their index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = PICKLED.inside(folder)
        self._home: dict[str, Path] = {}
        self._loaded: dict[Path, dict[str, torch.Tensor]] = {}
        self._num_read = 0
        self.tensors: dict[str, TensorInfo] = {}
        for path in self._files:
            for name, tensor in self._load(path).items():
                if name in self._home:
                    raise CheckpointError(
                        f"{folder} holds {name} in {self._home[name].name} and {path.name}"
                    )
                self._home[name] = path
                self.tensors[name] = TensorInfo(_DTYPES[tensor.dtype], tuple(tensor.shape), 0, 0)
            self._loaded.clear()

    @property
    def weight_files(self) -> list[Path]:
        """The `.bin` files and their index: `model.safetensors` takes their place."""
        index = self.folder / PICKLED.index
        return [*self._files, index] if index.exists() else self._files

    def file_of(self, name: str) -> Path:
        return self._home[name]

    def _load(self, path: Path) -> dict[str, torch.Tensor]:
        if path not in self._loaded:
            self._loaded[path] = _load(path)
        return self._loaded[path]

    def _bits(self, name: str) -> Bits:
        tensor = self._load(self._home[name])[name]
        bits = tensor.detach().view(_INTEGERS[tensor.element_size()]).numpy()
        return bits.view(bits_dtype(_DTYPES[tensor.dtype]))

    def read(self, source: Source, box: Box, out: Bits) -> None:
        copy_view(self._bits(source.name), source, box, out)

    def mapped(self, source: Source, box: Box) -> Bits | None:
        return mapped_part(self._bits(source.name), source, box)

    def forget(self, name: str) -> None:
        tensor = self._load(self._home[name])[name]
        self._num_read += tensor.numel() * tensor.element_size()
        if self._num_read > _MAX_MAPPED_BYTES:
            self._loaded.clear()
            self._num_read = 0


def _load(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file; CheckpointError in one line for anything else."""
    try:
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # torch raises many kinds, UnpicklingError among them
        if needed := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path} calls {needed[1]} when it is unpickled; only plain tensors are read"
            ) from None
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = [line for line in lines if "Unpickler error" in line] or lines
        reason = told[0] if told else type(error).__name__
        raise CheckpointError(f"{path} is cut, or no checkpoint: {reason}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}; named tensors are needed")
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{path}: {name} is a {type(tensor).__name__}; only tensors are read"
            )
        if tensor.layout != torch.strided or tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{path}: {name} is {tensor.layout} {tensor.dtype}, not supported"
            )
    return dict(state)
