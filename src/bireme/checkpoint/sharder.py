"""Writes sharded checkpoints: one file a rank, what else the source holds, then the manifest.

A rank's file is renamed into place when it is whole, with a note of its hashes beside it. A run
that was interrupted anywhere can be started again: it verifies what such notes say, keeps what
holds, and writes the rest. The manifest comes last, and the notes go. Like `cp`, nothing waits for
the disk; what a power cut loses, the hashes tell.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import msgspec
import xxhash

from bireme.checkpoint.artifact import Artifact, ReadStats, VerifiedFile
from bireme.checkpoint.manifest import (
    MANIFEST_NAME,
    UNUSED_NAME,
    CarriedFile,
    Manifest,
    StoredFile,
    StoredLayout,
    StoredPiece,
    StoredTensor,
    hash_file,
    piece_key,
    rank_file_name,
    write_manifest,
)
from bireme.checkpoint.names import NameMap
from bireme.checkpoint.origin import Origin, ShardableSource
from bireme.checkpoint.reader import MappedSource, TensorInfo
from bireme.checkpoint.writer import Entry, Progress, write_entries, write_file
from bireme.errors import CheckpointError
from bireme.parallel.layout import ModelLayout

_ASIDE = "source"  # the artifact's folder for files that would be mistaken for its own


@dataclass(frozen=True)
class ShardPlan:
    """What `shard` will write: the entries of each file."""

    files: dict[str, list[Entry]]

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entries in self.files.values() for entry in entries)


class _Finished(msgspec.Struct, frozen=True):
    """Left beside a finished file until the manifest is written."""

    job: str
    file: StoredFile
    pieces: list[StoredPiece]


def plan_shards(
    layout: ModelLayout, names: NameMap, tensors: Mapping[str, TensorInfo]
) -> ShardPlan:
    """One file a rank with the boxes that it holds, and one with the tensors that nobody needs."""
    files: dict[str, list[Entry]] = {}
    for rank in layout.ranks:
        entries = []
        for blocks in rank.blocks().values():
            for source, box in blocks:
                there = names.source(source)
                key = piece_key(there.name, there.shape, box)
                entries.append(Entry(key, there, box, tensors[there.name].dtype))
        files[rank_file_name(rank.rank, len(layout.ranks))] = entries
    if names.unused:
        files[UNUSED_NAME] = [Entry.whole(name, tensors[name]) for name in names.unused]
    return ShardPlan(files)


def shard(
    source: ShardableSource | Artifact,
    out: Path,
    layout: ModelLayout,
    names: NameMap,
    progress: Progress = lambda _: None,
) -> Manifest:
    """Writes `source`, a checkpoint or an artifact, as an artifact of `layout` in the folder `out`.

    `progress` gets bytes of tensors as they are written, or found to be written already.
    CheckpointError if `out` holds anything but an interrupted run of the same job.
    """
    plan, origin = plan_shards(layout, names, source.tensors), Origin.of(source)
    _prepare_folder(out, source.folder, plan, origin)
    finished = []
    for name, entries in plan.files.items():
        job = _job(origin.identity, entries)
        finished.append(
            _resume(out / name, job, entries, progress)
            or _finish(out / name, job, entries, source, progress)
        )
    carried = [_carry(name, path, out, xxh3) for name, path, xxh3 in origin.carried]
    if Origin.of(source).identity != origin.identity:
        raise CheckpointError(f"{source.folder} was changed while it was read; shard it again")
    manifest = Manifest(
        layout=_stored_layout(layout),
        files=[done.file for done in finished],
        tensors=_stored_tensors(plan, source.tensors, finished),
        unused=list(names.unused),
        sources=origin.sources,
        carried=carried,
    )
    manifest = write_manifest(out, manifest)
    for name in plan.files:
        _note_path(out / name).unlink()
    return manifest


def _stored_layout(layout: ModelLayout) -> StoredLayout:
    bounds = {rank.stage: rank.layers for rank in layout.ranks}
    return StoredLayout(layout.widths, tuple(stop - start for start, stop in bounds.values()))


def _stored_tensors(
    plan: ShardPlan, tensors: Mapping[str, TensorInfo], finished: list[_Finished]
) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    for entries, done in zip(plan.files.values(), finished, strict=True):
        for entry, piece in zip(entries, done.pieces, strict=True):
            name, info = entry.source.name, tensors[entry.source.name]
            if name not in stored:
                stored[name] = StoredTensor(info.dtype, info.shape, str(entry.source.view), [])
            stored[name].pieces.append(piece)
    return stored


# --- resuming -----------------------------------------------------------------------------------


def _job(source: str, entries: list[Entry]) -> str:
    """The identity of one file: the same source cut the same way."""
    digest = xxhash.xxh3_64(source.encode())
    for entry in entries:
        digest.update(f"{entry.key} {entry.source.view} {entry.dtype}\n".encode())
    return digest.hexdigest()


def _note_path(path: Path) -> Path:
    return path.with_suffix(".finished.json")


def _finish(
    path: Path, job: str, entries: list[Entry], source: MappedSource, progress: Progress
) -> _Finished:
    finished = _Finished(job, *write_entries(path, entries, source, progress))
    write_file(_note_path(path), lambda file: file.write(msgspec.json.encode(finished)))
    return finished


def _resume(path: Path, job: str, entries: list[Entry], progress: Progress) -> _Finished | None:
    """The note of a file that an earlier run of the same job finished, if its bytes still hold."""
    try:
        finished = msgspec.json.decode(_note_path(path).read_bytes(), type=_Finished)
        if finished.job != job:
            return None
        expected = [
            (entry.dtype, piece) for entry, piece in zip(entries, finished.pieces, strict=True)
        ]
        file = VerifiedFile(path.parent, finished.file, expected, ReadStats())
    except (OSError, msgspec.MsgspecError, CheckpointError):
        return None
    if any(file.check(lambda _: None)):
        return None
    progress(sum(entry.num_bytes for entry in entries))
    return finished


# --- the source's other files -------------------------------------------------------------------


def _stored_name(name: str) -> str:
    """Where a carried file goes: its own place, or aside if it would pass for one of ours."""
    is_ours = name == MANIFEST_NAME or PurePosixPath(name).parts[0] == _ASIDE
    is_ours |= name.endswith((".safetensors", ".index.json", ".finished.json", ".partial"))
    return f"{_ASIDE}/{name}" if is_ours else name


def _carry(name: str, path: Path, out: Path, expected: str | None) -> CarriedFile:
    target = out / _stored_name(name)
    found = copy_file(path, target, expected)
    return CarriedFile(name, _stored_name(name), target.stat().st_size, found)


def copy_file(path: Path, target: Path, expected: str | None) -> str:
    """Copies and returns the copy's xxh3; CheckpointError if it is not the `expected` one."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be copied to {target}: {error.strerror}") from None
    found = hash_file(target)
    if expected not in (None, found):
        raise CheckpointError(f"{path} is corrupt: xxh3 {found}, not {expected}")
    return found


def _prepare_folder(out: Path, source: Path, plan: ShardPlan, origin: Origin) -> None:
    check_target(out, source)
    if (out / MANIFEST_NAME).exists():
        raise CheckpointError(f"{out} already holds a finished artifact; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    notes = {_note_path(Path(name)).name for name in plan.files}
    ours = plan.files.keys() | notes | {MANIFEST_NAME}
    ours |= {f"{name}.partial" for name in ours}
    ours |= {PurePosixPath(_stored_name(name)).parts[0] for name, _, _ in origin.carried}
    if foreign := sorted(path.name for path in out.iterdir() if path.name not in ours):
        raise CheckpointError(
            f"{out} is not empty, {foreign[0]} is there; give a new or an empty folder"
        )
    present = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    needed = plan.num_bytes + sum(path.stat().st_size for _, path, _ in origin.carried) - present
    if needed > (free := shutil.disk_usage(out).free):
        raise CheckpointError(f"{out} has {free} bytes free on its disk; {needed} are needed")


def check_target(out: Path, source: Path) -> None:
    """CheckpointError if `out` is no place for what is made of the folder `source`."""
    if out.resolve() == source.resolve():
        raise CheckpointError(f"{out} is the source itself; give another folder")
    if out.resolve().is_relative_to(source.resolve()):
        raise CheckpointError(f"{out} lies inside the source {source}; give another folder")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; give a new or an empty folder")
