"""Matches what a model needs with what its files hold: one comparison, strict both ways."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bireme.checkpoint.reader import TensorInfo
from bireme.errors import CheckpointError
from bireme.parallel.layout import Source

_TIED_HEADS = (r"^lm_head\.weight$", r"^embed_out\.weight$")
_WEIGHT_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class NameMap:
    """Canonical source names to names in the files; `unused` are tensors that nobody needs."""

    prefix: str
    file_prefix: str
    unused: tuple[str, ...]

    def in_file(self, name: str) -> str:
        if self.prefix and name.startswith(self.prefix):
            return self.file_prefix + name.removeprefix(self.prefix)
        return name

    def source(self, source: Source) -> Source:
        """The same source under its name in the files."""
        return dataclasses.replace(source, name=self.in_file(source.name))


def match_names(
    sources: Mapping[str, Source],
    tensors: Mapping[str, TensorInfo],
    prefixes: tuple[str, ...],
    ignorable: tuple[str, ...],
    is_tied: bool,
    folder: Path,
    file_of: Callable[[str], Path],
) -> NameMap:
    """CheckpointError for a missing tensor, an unknown one, or one of the wrong shape or dtype."""
    maps = [NameMap(prefixes[0], prefix, ()) for prefix in prefixes]
    best = max(maps, key=lambda names: sum(names.in_file(name) in tensors for name in sources))
    wanted = {best.in_file(name): source for name, source in sources.items()}
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(wanted)} tensors that the model needs, "
            f"{missing[0]} the first of them"
        )
    for name, source in wanted.items():
        expected, found = source.view.file_shape(source.shape), tensors[name].shape
        if found != expected:
            raise CheckpointError(
                f"{file_of(name)}: {name} has shape {list(found)}; "
                f"config.json asks for {list(expected)}"
            )
        if (dtype := tensors[name].dtype) not in _WEIGHT_DTYPES:
            raise CheckpointError(
                f"{file_of(name)}: {name} is {dtype}; supported are {', '.join(_WEIGHT_DTYPES)}"
            )
    patterns = [re.compile(pattern) for pattern in ignorable + (_TIED_HEADS if is_tied else ())]
    unused = tuple(name for name in tensors if name not in wanted)
    for name in unused:
        if not any(pattern.search(name) for pattern in patterns):
            raise CheckpointError(
                f"{file_of(name)} holds {name}, which the model does not know; "
                "is config.json the right one?"
            )
    return dataclasses.replace(best, unused=unused)
