"""A model by its name: the folder, what its config files say, and what its tensors say of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bireme.checkpoint.hub import resolve_model
from bireme.hf_config import from_hf, read_json
from bireme.model_config import ModelConfig
from bireme.models.registry import family_of


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
    """Finds the model and reads its configs."""
    folder = resolve_model(model, needs_weights=needs_weights, reads_bin=reads_bin)
    hf = read_json(folder / "config.json")
    config = from_hf(hf)
    family_of(config)
    generation = folder / "generation_config.json"
    eos = (read_json(generation) if generation.exists() else {}).get(
        "eos_token_id", hf.get("eos_token_id")
    )
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return PreparedModel(model, folder, config, frozenset(ids))
