"""Matches what a model needs with what its files hold: one comparison, strict both ways."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bireme.checkpoint.reader import TensorInfo
from bireme.errors import CheckpointError
from bireme.parallel.layout import Source

_WEIGHT_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class NameMap:
    """Canonical source names to names in the files; `unused` are tensors that nobody needs.

    `aliases` are the sources that are there under the name of another tensor of the same value.
    """

    prefix: str
    file_prefix: str
    unused: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def in_file(self, name: str) -> str:
        if name in self.aliases:
            return self.aliases[name]
        if self.prefix and name.startswith(self.prefix):
            return self.file_prefix + name.removeprefix(self.prefix)
        return name

    def source(self, source: Source) -> Source:
        """The same source under its name in the files."""
        return dataclasses.replace(source, name=self.in_file(source.name))


def name_map(
    names: Collection[str], tensors: Collection[str], prefixes: tuple[str, ...]
) -> NameMap:
    """By the prefix under which most of `names` are among `tensors`; the first of equals."""
    maps = [NameMap(prefixes[0], prefix, ()) for prefix in prefixes]
    return max(maps, key=lambda found: sum(found.in_file(name) in tensors for name in names))


def match_names(
    sources: Mapping[str, Source],
    tensors: Mapping[str, TensorInfo],
    prefixes: tuple[str, ...],
    ignorable: tuple[str, ...],
    tied: tuple[str, str] | None,
    folder: Path,
    file_of: Callable[[str], Path],
) -> NameMap:
    """CheckpointError for a missing tensor, an unknown one, or one of the wrong shape or dtype.

    `tied` are the embedding's name and the head's where either serves both ends.
    """
    best = name_map(sources, tensors, prefixes)
    if tied:
        embedding, head = tied
        ignorable += (f"^{re.escape(head)}$",)
        if best.in_file(embedding) not in tensors and head in tensors:
            best = dataclasses.replace(best, aliases={embedding: head})
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
    patterns = [re.compile(pattern) for pattern in ignorable]
    unused = tuple(name for name in tensors if name not in wanted)
    for name in unused:
        if not any(pattern.search(name) for pattern in patterns):
            raise CheckpointError(
                f"{file_of(name)} holds {name}, which the model does not know; "
                "is config.json the right one?"
            )
    return dataclasses.replace(best, unused=unused)
