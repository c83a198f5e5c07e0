"""What an artifact keeps of its source beside the tensors, so that the source can come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bireme.checkpoint.artifact import Artifact
from bireme.checkpoint.manifest import SourceFile
from bireme.checkpoint.reader import Checkpoint, MappedSource
from bireme.checkpoint.writer import Entry, make_header
from bireme.errors import CheckpointError


class ShardableSource(MappedSource, Protocol):
    """A source that lies in a folder, with other files that go along."""

    folder: Path

    @property
    def weight_files(self) -> list[Path]:
        """The files that hold its tensors; all others are carried."""
        ...


@dataclass(frozen=True)
class Origin:
    """Headers of the source's safetensors files, and its other files.

    `identity` changes when a byte of the tensors is written, as far as the file system tells.
    """

    sources: list[SourceFile]
    carried: Sequence[tuple[str, Path, str | None]]  # name, where, its xxh3 if it is known
    identity: str

    @classmethod
    def of(cls, source: ShardableSource | Artifact) -> Origin:
        """Of an artifact, the source's source; CheckpointError where a file went away."""
        if isinstance(source, Artifact):
            manifest = source.manifest
            copies = [(f.name, source.folder / f.stored, f.xxh3) for f in manifest.carried]
            return cls(manifest.sources, copies, manifest.xxh3)
        folder = source.folder
        if isinstance(source, Checkpoint):
            sources = [
                SourceFile(file.path.relative_to(folder).as_posix(), file.header.decode())
                for file in source.files
            ]
        else:
            entries = [Entry.whole(name, info) for name, info in source.tensors.items()]
            header = make_header(entries, {"format": "pt"}).decode()
            sources = [SourceFile("model.safetensors", header)]
        weights = set(source.weight_files)
        others = [path for path in _files_below(folder) if path not in weights]
        carried = [(path.relative_to(folder).as_posix(), path, None) for path in others]
        return cls(sources, carried, "\n".join(_file_identity(path) for path in sorted(weights)))


def _files_below(folder: Path) -> list[Path]:
    """All files, those in hidden folders (.git, .cache) left out."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts[:-1])
    ]


def _file_identity(path: Path) -> str:
    """Size and times of a file; ctime tells of a change after which mtime was set back."""
    try:
        stat = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return f"{path.name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
