"""A model by its name: found, with what its config files and its tensors say of it; sharded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bireme.checkpoint.hub import resolve_model
from bireme.checkpoint.manifest import Manifest
from bireme.checkpoint.opener import match_source, open_folder, open_for_sharding
from bireme.checkpoint.sharder import plan_shards, shard
from bireme.checkpoint.tying import as_in_files
from bireme.config import ParallelConfig
from bireme.hf_config import eos_token_ids, from_hf, read_json
from bireme.model_config import ModelConfig
from bireme.models.registry import model_layout


@dataclass(frozen=True)
class PreparedModel:
    """A model folder, its config, and the ids that end its answers."""

    name: str
    folder: Path
    config: ModelConfig
    eos_token_ids: frozenset[int]


def prepare_model(
    model: str, *, needs_weights: bool = True, reads_bin: bool = False
) -> PreparedModel:
    """Finds the model and reads its configs; where its weights are needed, they have their say."""
    folder = resolve_model(model, needs_weights=needs_weights, reads_bin=reads_bin)
    hf = read_json(folder / "config.json")
    config = from_hf(hf)
    if needs_weights and config.tie_word_embeddings:
        config = as_in_files(config, (open_for_sharding if reads_bin else open_folder)(folder))
    generation = folder / "generation_config.json"
    given = read_json(generation) if generation.exists() else {}
    return PreparedModel(model, folder, config, eos_token_ids(hf, given, config.vocab_size))


def shard_model(
    model: str | Path,
    out: Path,
    parallel: ParallelConfig,
    progress: Callable[[int, int], None] = lambda _, total: None,
) -> Manifest:
    """Writes `model`, a checkpoint or an artifact, as an artifact of the layout `parallel`.

    `progress` gets the bytes of tensors that were written since its last call, and those in all.

        shard_model("demo", Path("shards"), ParallelConfig.of(2, 2))
    """
    prepared = prepare_model(str(model), reads_bin=True)
    layout = model_layout(prepared.config, parallel)
    layout.check()
    source = open_for_sharding(prepared.folder)
    names = match_source(source, layout, prepared.config)
    total = plan_shards(layout, names, source.tensors).num_bytes
    return shard(source, out, layout, names, lambda num_bytes: progress(num_bytes, total))
