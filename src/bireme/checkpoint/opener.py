"""Opens a model folder as a source of tensors, its names matched with what the model needs."""

from __future__ import annotations

from pathlib import Path

from bireme.checkpoint.artifact import Artifact
from bireme.checkpoint.files import PICKLED, SAFETENSORS
from bireme.checkpoint.manifest import check_not_broken, is_artifact
from bireme.checkpoint.names import NameMap, match_names
from bireme.checkpoint.pickled import PickledCheckpoint
from bireme.checkpoint.reader import Checkpoint
from bireme.model_config import ModelConfig
from bireme.models.registry import end_names, family_of
from bireme.parallel.layout import ModelLayout

Opened = Checkpoint | Artifact | PickledCheckpoint


def open_folder(folder: Path, rank: int = 0) -> Checkpoint | Artifact:
    """CheckpointError if the folder holds neither; `rank` is the one that will read it."""
    if is_artifact(folder):
        return Artifact(folder, rank)
    check_not_broken(folder)
    return Checkpoint(folder)


def open_for_sharding(folder: Path) -> Opened:
    """Like `open_folder`, and reads `.bin` files where there is nothing better."""
    if not is_artifact(folder) and not SAFETENSORS.inside(folder) and PICKLED.inside(folder):
        return PickledCheckpoint(folder)
    return open_folder(folder)


def match_source(source: Opened, layout: ModelLayout, config: ModelConfig) -> NameMap:
    """The strict comparison, both ways; CheckpointError names what is missing or too much."""
    family = family_of(config)
    return match_names(
        layout.sources,
        source.tensors,
        family.prefixes,
        family.ignorable,
        end_names(config) if config.tie_word_embeddings else None,
        source.folder,
        source.file_of,
    )
