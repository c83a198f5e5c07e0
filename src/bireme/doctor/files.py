"""Is the artifact whole: its files, their checksums, and the certificates beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bireme.checkpoint.artifact import Artifact
from bireme.checkpoint.manifest import is_artifact, rank_file_name, read_manifest
from bireme.doctor.evidence import RankFacts
from bireme.errors import CheckpointError
from bireme.verify.certificate import Certificate

Cut = tuple[tuple[int, ...], tuple[int, ...]]  # widths, and layers, of each stage


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
    return [
        *found,
        *(str(it) for _, it in _certificates(folder) if isinstance(it, CheckpointError)),
    ]


@dataclass(frozen=True)
class Certified:
    """By the certificates beside an artifact: a line for each that says that the cut model is another, and what to
    know of the others."""

    departures: list[str]
    notes: list[str]


def certified(folder: Path, cut: Cut | None = None) -> Certified:
    """Of what was verified cut like this, where that is given; certificates of other files are left aside."""
    own = _own_hash(folder)
    departures, notes = list[str](), list[str]()
    for path, found in _certificates(folder):
        if isinstance(found, CheckpointError):
            continue  # damage
        if cut is not None and (found.widths, found.layers_per_stage) != cut:
            continue
        if own is not None and found.artifact is not None and found.artifact != own:
            notes.append(
                f"{path} is left aside: it is of an artifact whose manifest hashes to {found.artifact}, and this "
                f"one's to {own}; bireme verify this one"
            )
        elif not found.is_same:
            departures.append(_departure(found))
    return Certified(departures, notes)


def weight_facts(folder: Path) -> list[RankFacts]:
    """Bytes that each rank of the artifact's own layout holds; none where its manifest is damaged."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return []
    sizes = {file.name: file.num_bytes - file.header_bytes for file in manifest.files}
    widths = manifest.layout.widths
    stages = [stage for stage, width in enumerate(widths) for _ in range(width)]
    names = [rank_file_name(rank, sum(widths)) for rank in range(sum(widths))]
    return [
        RankFacts(
            name=f"rank {rank}", stage=stage, device="file", memory={"weights": sizes.get(name, 0)}
        )
        for rank, (stage, name) in enumerate(zip(stages, names, strict=True))
    ]


def _departure(found: Certificate) -> str:
    return (
        f"at {found.layout} it differs from {found.reference} by {found.relative_difference:.1e} of the "
        f"logits' spread, {found.tolerance:.1e} is allowed"
        + (f": {found.departure}" if found.departure else "")
    )


def _own_hash(folder: Path) -> str | None:
    """None where the manifest is damaged."""
    try:
        return read_manifest(folder).xxh3
    except CheckpointError:
        return None


def _certificates(folder: Path) -> Iterator[tuple[Path, Certificate | CheckpointError]]:
    for path in sorted(folder.glob("certificate-*.json")):
        try:
            yield path, msgspec.json.decode(path.read_bytes(), type=Certificate)
        except msgspec.DecodeError as error:
            yield path, CheckpointError(f"{path} is no certificate of ours: {error}")
