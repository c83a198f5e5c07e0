"""Whether a model's head is its embedding: config.json says so, and its files may say otherwise.

As transformers has it: two tensors that differ are two, whatever config.json says, and one that is
there alone serves both ends (`names.py`).
"""

from __future__ import annotations

import dataclasses

from bireme.checkpoint.artifact import Artifact
from bireme.checkpoint.names import name_map
from bireme.checkpoint.opener import Opened
from bireme.checkpoint.writer import SLAB_BYTES, Entry, read_slabs
from bireme.model_config import ModelConfig
from bireme.models.registry import end_names, family_of

_SLABS_HELD = 64


def as_in_files(config: ModelConfig, source: Opened) -> ModelConfig:
    """The config, untied where the files hold a head that is not the embedding."""
    if not config.tie_word_embeddings:
        return config
    embedding, head = end_names(config)
    embedding = name_map([embedding], source.tensors, family_of(config).prefixes).in_file(embedding)
    has_both = embedding in source.tensors and head in source.tensors
    return dataclasses.replace(
        config, tie_word_embeddings=not has_both or _are_one(source, embedding, head)
    )


def _are_one(source: Opened, embedding: str, head: str) -> bool:
    """True if both have the same bits; an artifact kept the answer, and is not read for it."""
    if isinstance(source, Artifact):
        return head in source.manifest.unused
    infos = [source.tensors[name] for name in (embedding, head)]
    if len({(info.dtype, info.shape) for info in infos}) > 1:
        return False
    entries = [Entry.whole(name, info) for name, info in zip((embedding, head), infos, strict=True)]
    slabs = zip(*(read_slabs(source, entry, SLAB_BYTES) for entry in entries), strict=True)
    for index, (ours, theirs) in enumerate(slabs):
        if bytes(ours) != bytes(theirs):
            return False
        if index % _SLABS_HELD == 0:
            source.forget(embedding)
            source.forget(head)
    return True
