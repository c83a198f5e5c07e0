"""Gives traced blocks their weights: each reads its own tensors, and nobody reads another's."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

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


def open_weights(model: VisionModel, module: nn.Module) -> tuple[TensorSource, dict[str, str]]:
    """Where the module's tensors come from, and what they are called there. CheckpointError names
    what is missing or has another shape."""
    tensors = dict(_tensors(module))
    if model.weights is None:
        return MadeUpWeights(tensors, model.seed), {name: name for name in tensors}
    source = Checkpoint(Path(model.weights))
    names = huggingface.file_names(module, source.tensors)
    for name in module.state_dict():
        if name.endswith("num_batches_tracked"):
            continue
        if name not in names:
            raise CheckpointError(f"{model.weights} has no tensor {name}, which {model.name} needs")
        there = source.tensors[names[name]].shape
        if there != tuple(tensors[name].shape):
            raise CheckpointError(
                f"{model.weights}: {names[name]} has the shape {list(there)}, but {model.name} "
                f"needs {list(tensors[name].shape)}"
            )
    return source, names


def materialise(
    block: nn.Module, source: TensorSource, names: Mapping[str, str], device: torch.device
) -> nn.Module:
    """A copy of a block of meta, on the device and filled."""
    made = copy.deepcopy(block)
    unfilled = {name for name, tensor in _tensors(block) if tensor.is_meta}
    for owner in made.modules():
        stores: tuple[Any, ...] = owner._parameters, owner._buffers
        for own in stores:
            for name, tensor in own.items():
                if tensor is not None and tensor.is_meta:
                    own[name] = _empty(tensor, device)
                elif tensor is not None:  # a constant of the forward
                    own[name] = tensor.to(device)
        _move_factories(owner, device)
    for name, tensor in _tensors(made):
        if name in names:
            shape = tuple(tensor.shape)
            read_box(tensor, Source(names[name], shape), full_box(shape), source)
            source.forget(names[name])
        elif name in unfilled:
            raise CheckpointError(f"{name} is in no file: it is a buffer that is not saved")
    return made


def _empty(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    made = torch.empty_like(tensor, device=device)
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in module.named_parameters(remove_duplicate=False):
        yield name, parameter.data
    yield from module.named_buffers(remove_duplicate=False)


def _move_factories(owner: nn.Module, device: torch.device) -> None:
    """Tensors that the graph makes (`arange`) were traced on meta."""
    graph = getattr(owner, "graph", None)
    if not isinstance(graph, torch.fx.Graph):
        return
    for node in graph.nodes:
        if node.kwargs.get("device") == torch.device("meta"):
            node.update_kwarg("device", device)
    if isinstance(owner, torch.fx.GraphModule):
        owner.recompile()
