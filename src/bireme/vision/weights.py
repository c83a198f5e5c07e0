"""Gives traced blocks their weights: each reads its own tensors, and nobody reads another's."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.export.unflatten import InterpreterModule

from bireme.checkpoint.dummy import DummySource, uniform
from bireme.checkpoint.loader import read_box
from bireme.checkpoint.reader import Checkpoint, TensorSource
from bireme.errors import CheckpointError
from bireme.parallel.layout import Source, full_box
from bireme.vision import huggingface
from bireme.vision.model import VisionModel

_NORM_SCALE = 0.5  # of a BatchNorm: a residual branch of three adds 1/64 of the variance


class MadeUpWeights(DummySource):
    """Values are a function of (seed, name, index), whatever the cut.

    Products keep the variance of what they are given, convolutions of what a ReLU leaves of it.
    BatchNorm scales by a half, so that residual branches add little and 152 layers neither vanish
    nor explode; its running statistics are near 0 and 1.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], seed: int) -> None:
        shapes = {name: Source(name, tuple(tensor.shape)) for name, tensor in tensors.items()}
        super().__init__({name: it for name, it in shapes.items() if it.shape}, seed)
        self._batch_norms = {
            name.removesuffix("running_var") + "weight"
            for name in tensors
            if name.endswith("running_var")
        }

    def _values(self, source: Source, index: np.ndarray) -> np.ndarray:
        noise = uniform(self._seed, source.name, index)
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
    needed = {name: tensor for name, tensor in _tensors(module) if name not in constants}
    if model.weights is None:
        return Weights(
            MadeUpWeights(needed, model.seed), {name: name for name in needed}, constants
        )
    source = Checkpoint(Path(model.weights))
    names = huggingface.file_names(module, source.tensors)
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


def _constants(model: VisionModel, module: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers of integers, and those that are not saved. The few modules that have any are built once
    more on the host, for these alone."""
    saved = module.state_dict().keys()
    names = {
        name
        for name, buffer in module.named_buffers(remove_duplicate=False)
        if name not in saved or not buffer.is_floating_point()
    }
    if all(name.endswith("num_batches_tracked") for name in names):  # training's
        return {name: torch.tensor(0) for name in names}
    buffers = dict(model.build("cpu").named_buffers(remove_duplicate=False))
    return {name: buffers[name] for name in names}


def materialise(block: nn.Module, weights: Weights, device: torch.device) -> nn.Module:
    """A copy of a block of meta, on the device and filled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's own, on its tree specs
        made = copy.deepcopy(block)
    for owner in made.modules():
        _prepare_graph(owner, device)
        stores: tuple[Any, ...] = owner._parameters, owner._buffers
        for own in stores:
            for name, tensor in own.items():
                if tensor is not None:
                    own[name] = _empty(tensor, device) if tensor.is_meta else tensor.to(device)
    unfilled = {name for name, tensor in _tensors(block) if tensor.is_meta}
    for name, tensor in _tensors(made):
        if name in unfilled:
            weights.fill(name, tensor)
    return made


def _empty(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    made = torch.empty_like(tensor, device=device)
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in module.named_parameters(remove_duplicate=False):
        yield name, parameter.data
    yield from module.named_buffers(remove_duplicate=False)


def _prepare_graph(owner: nn.Module, device: torch.device) -> None:
    """Tensors that the graph makes (`arange`) were traced on meta. It runs as code: torch's interpreter
    takes 60 us a node, as long again as a small image does."""
    if not isinstance(owner, InterpreterModule | fx.GraphModule):
        return
    makers = [it for it in owner.graph.nodes if it.kwargs.get("device") == torch.device("meta")]
    for node in makers:
        node.update_kwarg("device", device)
    if isinstance(owner, InterpreterModule):
        owner._run_with_interpreter = False
        if makers:
            owner.finalize()
    elif makers:
        owner.recompile()
