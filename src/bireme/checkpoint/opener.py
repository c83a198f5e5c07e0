"""Opens a model folder as a source of tensors, its names matched with what the model needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bireme.checkpoint.artifact import Artifact
from bireme.checkpoint.manifest import is_artifact
from bireme.checkpoint.names import NameMap, match_names
from bireme.checkpoint.reader import Checkpoint
from bireme.models.blocks import Family
from bireme.parallel.layout import Source


def open_folder(folder: Path) -> Checkpoint | Artifact:
    """CheckpointError if the folder holds neither."""
    return Artifact(folder) if is_artifact(folder) else Checkpoint(folder)


def match_source(
    source: Checkpoint | Artifact, sources: Mapping[str, Source], family: Family, is_tied: bool
) -> NameMap:
    """The strict comparison, both ways; CheckpointError names what is missing or too much."""
    return match_names(
        sources, source.tensors, family.prefixes, family.ignorable, is_tied, str(source.folder)
    )
