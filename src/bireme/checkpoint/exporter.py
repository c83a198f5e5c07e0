"""Turns an artifact back into the checkpoint that it was made from, every file byte for byte."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bireme.checkpoint.artifact import Artifact
from bireme.checkpoint.manifest import SourceFile
from bireme.checkpoint.reader import Bits, parse_header, part_of
from bireme.checkpoint.sharder import check_target, copy_file
from bireme.checkpoint.writer import (
    Entry,
    Progress,
    partial_of,
    read_slabs,
    slab_bytes,
    with_length,
    write_file,
)
from bireme.errors import CheckpointError
from bireme.parallel.boxes import Box, as_slices, box_shape
from bireme.parallel.layout import Source


def export(artifact: Artifact, out: Path, progress: Progress = lambda _: None) -> None:
    """Writes the artifact's source into the new folder `out`; `progress` gets bytes of tensors.

    What was a `.bin` checkpoint comes back as one `model.safetensors` with the same tensors in the
    same order. CheckpointError names what is damaged; `out` is then as it was before.
    """
    check_target(out, artifact.folder)
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty; give a new or an empty folder")
    artifact.check_files()
    names = [carried.name for carried in artifact.manifest.carried]
    names += [source.name for source in artifact.manifest.sources]
    with _removed_on_failure(out, names):
        for carried in artifact.manifest.carried:
            copy_file(artifact.folder / carried.stored, out / carried.name, carried.xxh3)
        for source in artifact.manifest.sources:
            _export_file(artifact, source, out / source.name, progress)


@contextlib.contextmanager
def _removed_on_failure(out: Path, names: list[str]) -> Iterator[None]:
    """The folder `out`; if the body raises, without the files `names` and the folders made here."""
    paths = [out / name for name in names]
    inner = {folder for path in paths for folder in path.parents if folder.is_relative_to(out)}
    made = [path for path in (*inner, out, *out.parents) if not path.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in paths:
            for written in (path, partial_of(path)):
                with contextlib.suppress(OSError):
                    written.unlink(missing_ok=True)
        for folder in sorted(set(made), key=lambda path: len(path.parts), reverse=True):
            with contextlib.suppress(OSError):  # not empty: somebody else put something there
                folder.rmdir()
        raise


def _export_file(artifact: Artifact, source: SourceFile, path: Path, progress: Progress) -> None:
    as_in_file = _AsInFile(artifact)

    def write(file: BinaryIO) -> None:
        header = source.header.encode()
        file.write(with_length(header))
        for name in parse_header(header):
            size = slab_bytes(artifact.source(name).view)
            for data in read_slabs(as_in_file, Entry.whole(name, artifact.tensors[name]), size):
                file.write(data)
                progress(len(data))
            artifact.forget(name)

    write_file(path, write)


class _AsInFile:
    """The tensors of an artifact as they lay in the source's files, before any view."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact, self.tensors, self.forget = artifact, artifact.tensors, artifact.forget

    def read(self, source: Source, box: Box, out: Bits) -> None:
        stored = self._artifact.source(source.name)
        for logical_box, target in stored.inverse.view.file_boxes(box, source.shape):
            if stored.view.kind == "transpose":
                rows = np.empty(box_shape(logical_box), dtype=out.dtype)
                self._artifact.read(stored, logical_box, rows)
                out[as_slices(target)] = rows.T
            else:
                self._artifact.read(stored, logical_box, part_of(out, target))

    def mapped(self, source: Source, box: Box) -> Bits | None:
        stored = self._artifact.source(source.name)
        return self._artifact.mapped(stored, box) if stored.view.kind == "identity" else None
