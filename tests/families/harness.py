"""What the family tests share: checkpoints made once, and the settings that they run with."""

from __future__ import annotations

from pathlib import Path

import zoo

from bireme.checkpoint.prepared import PreparedModel, prepare_model
from bireme.config import EngineConfig, ParallelConfig
from bireme.verify import Reference, transformers_reference


class Checkpoints:
    """Models of `zoo.CASES`, written when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._models: dict[str, PreparedModel] = {}
        self._references: dict[tuple[str, int], Reference] = {}

    def model(self, name: str) -> PreparedModel:
        if name not in self._models:
            folder = zoo.write(zoo.CASES[name], self._folder / name)
            self._models[name] = prepare_model(str(folder))
        return self._models[name]

    def reference(self, name: str, num_decode: int = zoo.NUM_DECODE) -> Reference:
        key = (name, num_decode)
        if key not in self._references:
            model, prompts = self.model(name), zoo.prompts()
            self._references[key] = transformers_reference(model, prompts, num_decode, "float32")
        return self._references[key]


def engine_config(*widths: int) -> EngineConfig:
    """Small blocks, so that contexts span many; as few slots as there are prompts."""
    return EngineConfig(
        parallel=ParallelConfig(widths=widths or (1,)),
        dtype="float32",
        device="cpu",
        block_size=8,
        max_num_seqs=len(zoo.PROMPT_LENGTHS),
    )
