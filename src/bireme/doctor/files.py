"""Is the artifact whole: its files, their checksums, and the certificates beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from bireme.checkpoint.artifact import Artifact
from bireme.checkpoint.manifest import is_artifact
from bireme.errors import CheckpointError
from bireme.verify.certificate import Certificate


def check_artifact(folder: Path) -> None:
    """CheckpointError where the folder is something else."""
    if not is_artifact(folder):
        raise CheckpointError(
            f"{folder} is no sharded checkpoint, and no run; bireme shard or bireme profile makes one"
        )


def num_bytes(folder: Path) -> int:
    """Of the artifact's files, which are all read; 0 where its manifest is damaged."""
    try:
        return sum(file.num_bytes for file in Artifact(folder).manifest.files)
    except CheckpointError:
        return 0


def damage(folder: Path, progress: Callable[[int], None] = lambda _: None) -> list[str]:
    """A line for each file or tensor of the artifact that is not what it was, or certificate that is none."""
    try:
        found = Artifact(folder).check(progress)
    except CheckpointError as error:
        found = [str(error)]
    return [*found, *(str(it) for it in _certificates(folder) if isinstance(it, CheckpointError))]


def departures(folder: Path) -> list[str]:
    """A line for each certificate that says that the cut model is another."""
    return [
        f"at {found.layout} it differs from {found.reference} by {found.relative_difference:.1e} of the "
        f"logits' spread, {found.tolerance:.1e} is allowed"
        + (f": {found.departure}" if found.departure else "")
        for found in _certificates(folder)
        if isinstance(found, Certificate) and not found.is_same
    ]


def _certificates(folder: Path) -> Iterator[Certificate | CheckpointError]:
    for path in sorted(folder.glob("certificate-*.json")):
        try:
            yield msgspec.json.decode(path.read_bytes(), type=Certificate)
        except msgspec.DecodeError as error:
            yield CheckpointError(f"{path} is no certificate of ours: {error}")
