"""What a rank computed in a step, written to files: the raw material of `verify`.

One safetensors file a step and rank. Keys: 'logits' [T, V]; '<parameter>:out' of column-parallel
and replicated layers; '<parameter>:in', ':partial' (before the sum) and ':out' of row-parallel
ones; 'layer.N'.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum, auto
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.hooks import RemovableHandle

from bireme.kernels.functional import whole
from bireme.models.blocks import MoE, StageModel
from bireme.parallel.layers import (
    ColumnParallelLinear,
    ParallelModule,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from bireme.request import ScheduledBatch

Hook = Callable[[nn.Module, Any, Any], None]


def capture_path(folder: Path, step_id: int, rank: int) -> Path:
    return folder / f"step-{step_id:06d}-rank-{rank:05d}.safetensors"


class Watch(Enum):
    """What somebody sees of a step's modules, which a graph would hide."""

    NOTHING = auto()
    TIMES = auto()  # of the kernels that run anyway
    ALL = auto()  # what every module makes, for which a GPU has kernels that round elsewhere


class StepCapture:
    """Logits of every token of each step and, with `probes`, what each layer computed."""

    def __init__(self, folder: Path, rank: int, model: StageModel, *, probes: bool) -> None:
        self._folder, self._rank, self.has_probes = folder, rank, probes
        self._found: dict[str, torch.Tensor] = {}
        self._handles: list[RemovableHandle] = []
        if not probes:
            return
        for module in model.modules():
            hook = self._hook_for(module)
            if hook is not None:
                self._handles.append(module.register_forward_hook(hook))
        for index, layer in model.layers.items():
            self._handles.append(layer.register_forward_hook(self._layer(index)))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def add_logits(self, logits: torch.Tensor) -> None:
        """[T, V] of this rank's vocabulary rows, padding left out by the caller."""
        self._add("logits", logits)

    def finish_step(self, batch: ScheduledBatch) -> None:
        order = {"order": json.dumps(list(self._found))}  # the file sorts its keys
        save_file(self._found, capture_path(self._folder, batch.step_id, self._rank), order)
        self._found = {}

    def _add(self, key: str, value: torch.Tensor) -> None:
        self._found.setdefault(key, value.detach().to("cpu", torch.float32).contiguous().clone())

    def _hook_for(self, module: nn.Module) -> Hook | None:
        if isinstance(module, ColumnParallelLinear):
            return self._column
        if isinstance(module, RowParallelLinear | VocabParallelEmbedding | MoE):
            return self._summed
        if isinstance(module, ParallelModule) and "weight" in module.layouts:
            return self._replicated
        return None

    def _layer(self, index: str) -> Hook:
        return lambda _module, _inputs, output: self._add(f"layer.{index}", output)

    def _column(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        assert isinstance(module, ColumnParallelLinear)
        joined = torch.cat(output, dim=-1) if isinstance(output, tuple) else output
        self._add(f"{module.layouts['weight'].name}:out", joined)

    def _summed(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        assert isinstance(module, RowParallelLinear | VocabParallelEmbedding | MoE)
        name = next(iter(module.layouts.values())).name
        if inputs[0].is_floating_point():
            self._add(f"{name}:in", inputs[0])
        self._add(f"{name}:partial", whole(module.partial(inputs[0]), output.dtype))
        self._add(f"{name}:out", output)

    def _replicated(self, module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        assert isinstance(module, ParallelModule)
        if module.layouts["weight"].cut == "replicated":
            self._add(f"{module.layouts['weight'].name}:out", output)
