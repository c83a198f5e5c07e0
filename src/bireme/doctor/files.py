"""Is the artifact whole: its files, their checksums, and the certificates beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from bireme.checkpoint.artifact import Artifact
from bireme.checkpoint.manifest import is_artifact
from bireme.errors import CheckpointError
from bireme.verify.certificate import Certificate


def num_bytes(folder: Path) -> int:
    """Of the artifact's files, which are all read; 0 where it is another checkpoint."""
    if not is_artifact(folder):
        return 0
    return sum(file.num_bytes for file in Artifact(folder).manifest.files)


def damage(folder: Path, progress: Callable[[int], None] = lambda _: None) -> list[str]:
    """A line for each file or tensor that is not what it was, none where the folder is no artifact."""
    if not is_artifact(folder):
        return []
    try:
        return Artifact(folder).check(progress)
    except CheckpointError as error:
        return [str(error)]


def failed_certificates(folder: Path) -> Iterator[Certificate]:
    """Of comparisons in which the cut model was another."""
    for path in sorted(folder.glob("certificate-*.json")):
        try:
            found = msgspec.json.decode(path.read_bytes(), type=Certificate)
        except msgspec.DecodeError as error:
            raise CheckpointError(f"{path} is no certificate of ours: {error}") from None
        if not found.is_same:
            yield found
