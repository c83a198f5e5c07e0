"""Which files of a model folder hold its weights: the names that Hugging Face checkpoints use."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from bireme.errors import CheckpointError
from bireme.hf_config import read_json


def is_inside(name: str) -> bool:
    """True for a relative path that stays below its folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


@dataclass(frozen=True)
class WeightFiles:
    """One format: a single file, or several that an index lists, or several without one."""

    single: str
    index: str
    pattern: str

    def among(self, names: Collection[str], folder: Path) -> list[str]:
        """Those of `names` that hold the weights; an index is read in `folder`."""
        if self.single in names:
            return [self.single]
        if self.index in names:
            return sorted(_indexed(folder / self.index))
        return sorted(name for name in names if "/" not in name and fnmatch(name, self.pattern))

    def inside(self, folder: Path) -> list[Path]:
        """The files of `folder`, none if it has none; CheckpointError if one of them is missing."""
        present = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        names = self.among(present, folder)
        for name in names:
            if not (folder / name).is_file():
                tensor = _indexed(folder / self.index)[name]
                raise CheckpointError(
                    f"{folder / name} is missing; {self.index} says that it holds {tensor}"
                )
        return [folder / name for name in names]


SAFETENSORS = WeightFiles("model.safetensors", "model.safetensors.index.json", "*.safetensors")
PICKLED = WeightFiles("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model*.bin")


def _indexed(index: Path) -> dict[str, str]:
    """The files that an index names, each with its first tensor."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    files = {str(file): tensor for tensor, file in reversed(weight_map.items())}
    for name in files:
        if not is_inside(name):
            raise CheckpointError(f"{index} names {name}, which lies outside the folder")
    return files
