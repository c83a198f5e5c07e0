"""Gives traced blocks their weights: each reads its own tensors, and nobody reads another's."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import fx, nn

from bireme.checkpoint.dummy import DummySource, uniform
from bireme.checkpoint.loader import read_box
from bireme.checkpoint.reader import Bits, Checkpoint, TensorSource
from bireme.errors import CheckpointError, ConfigError
from bireme.parallel.boxes import Box, full_box
from bireme.parallel.layout import Source
from bireme.vision import huggingface
from bireme.vision.flattening import own_name
from bireme.vision.model import VisionModel
from bireme.vision.tracing import named_tensors, stores

_Module = TypeVar("_Module", bound=nn.Module)
_NORM_SCALE = 0.5  # of a BatchNorm: a residual branch of three adds 1/64 of the variance


class MadeUpWeights(DummySource):
    """Values are a function of (seed, name, index), whatever the cut.

    Products keep the variance of what they are given, convolutions of what a ReLU leaves of it.
    BatchNorm scales by a half, so that residual branches add little and 152 layers neither vanish
    nor explode; its running statistics are near 0 and 1.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], seed: int) -> None:
        super().__init__(
            {name: Source(name, tuple(it.shape)) for name, it in tensors.items()}, seed
        )
        self._batch_norms = {
            name.removesuffix("running_var") + "weight"
            for name in tensors
            if name.endswith("running_var")
        }

    def read(self, source: Source, box: Box, out: Bits) -> None:
        """A scalar as a vector of one."""
        if not source.shape:
            source, box, out = Source(source.name, (1,)), full_box((1,)), out.reshape(1)
        super().read(source, box, out)

    def _values(self, source: Source, index: np.ndarray) -> np.ndarray:
        noise = uniform(self.seed, source.name, index)
        if len(source.shape) > 1:
            variance = (2 if len(source.shape) > 2 else 1) / math.prod(source.shape[1:])
            return noise * np.float32(math.sqrt(3 * variance))
        if source.name in self._batch_norms:
            return noise * np.float32(0.1) + np.float32(_NORM_SCALE)
        is_near_one = source.name.endswith(("weight", "running_var"))
        return noise * np.float32(0.1) + np.float32(1 if is_near_one else 0)


@dataclass(frozen=True)
class Weights:
    """Where a module's tensors come from: what they are called there, and those that its constructor
    computes and no file holds."""

    source: TensorSource
    names: Mapping[str, str]
    constants: Mapping[str, torch.Tensor]

    def fill(self, name: str, tensor: torch.Tensor) -> None:
        if name in self.constants:
            tensor.copy_(self.constants[name])
            return
        shape = tuple(tensor.shape)
        read_box(tensor, Source(self.names[name], shape), full_box(shape), self.source)
        self.source.forget(self.names[name])


def open_weights(model: VisionModel, module: nn.Module) -> Weights:
    """Of `module`, which is on meta. CheckpointError names what is missing or has another shape."""
    constants = _constants(model, module)
    needed = {name: it for name, it in named_tensors(module) if name not in constants}
    if model.weights is None:
        names = _stored_names(needed, {name: name for name in needed})
        return Weights(MadeUpWeights(needed, model.seed), names, constants)
    source = Checkpoint(Path(model.weights))
    names = _stored_names(needed, huggingface.file_names(module, source.tensors))
    for name, tensor in needed.items():
        if name not in names:
            raise CheckpointError(f"{model.weights} has no tensor {name}, which {model.name} needs")
        there = source.tensors[names[name]].shape
        if there != tuple(tensor.shape):
            raise CheckpointError(
                f"{model.weights}: {names[name]} has the shape {list(there)}, but {model.name} "
                f"needs {list(tensor.shape)}"
            )
    return Weights(source, names, constants)


def _stored_names(needed: Mapping[str, torch.Tensor], stored: Mapping[str, str]) -> dict[str, str]:
    """A tensor that a module has under several names is stored under one of them at least."""
    found: dict[int, str] = {}
    for name, tensor in needed.items():
        if name in stored:
            found.setdefault(id(tensor), stored[name])
    return {name: found[id(it)] for name, it in needed.items() if id(it) in found}


def _constants(model: VisionModel, module: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers of integers, those that are not saved, and tensors that are plain attributes. The few
    modules that have any are built once more on the host, for these alone."""
    saved = module.state_dict().keys()
    names = {
        name
        for name, tensor in named_tensors(module)
        if name not in saved or not tensor.is_floating_point()
    }
    if all(name.endswith("num_batches_tracked") for name in names):  # training's
        return {name: torch.tensor(0) for name in names}
    computed = {name: it for name, it in named_tensors(model.build_constants()) if name in names}
    for name in sorted(names):
        if name not in computed or computed[name].is_meta:
            raise ConfigError(
                f"{model.name} computes {name} from its weights when it is made; compute it in forward"
            )
    return computed


def materialise(block: _Module, weights: Weights, device: torch.device) -> _Module:
    """A copy of a block of meta, on the device and filled."""
    made = copy.deepcopy(block)
    if isinstance(made, fx.GraphModule):
        _make_tensors_on(device, made)
    for owner in made.modules():
        for own in stores(owner):
            for name, tensor in own.items():
                if isinstance(tensor, torch.Tensor):
                    own[name] = _empty(tensor, device) if tensor.is_meta else tensor.to(device)
    unfilled = {name for name, tensor in named_tensors(block) if tensor.is_meta}
    for name, tensor in named_tensors(made):
        if name in unfilled:
            weights.fill(own_name(name), tensor)
    return made


def _empty(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    made = torch.empty_like(tensor, device=device)
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


def _make_tensors_on(device: torch.device, graph: fx.GraphModule) -> None:
    """Those that the graph makes (`arange`) were traced on meta."""
    makers = [it for it in graph.graph.nodes if it.kwargs.get("device") == torch.device("meta")]
    for node in makers:
        node.update_kwarg("device", device)
    if makers:
        graph.recompile()
