"""A module cut into blocks, traced on the meta device.

`torch.distributed.pipelining` traces and splits; it runs nothing. The batch dim is dynamic: one trace
serves every micro-batch, the short last one included.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import fx, nn
from torch.distributed.pipelining import pipeline

from bireme.errors import ConfigError
from bireme.vision.cut_points import BlockShape, Cutter
from bireme.vision.flattening import flatten, own_name

_NUM_NAMED = 3  # points to cut at, where one is unknown
_EXAMPLE_BATCH = 2  # torch.export takes 0 and 1 for constants


def num_bytes(module: nn.Module) -> int:
    """Of all its tensors."""
    tensors = (*module.parameters(), *module.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def stores(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Where a module keeps its own parameters, buffers and plain attributes."""
    return module._parameters, module._buffers, vars(module)


def named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, buffers and plain attributes, under all of their names."""
    for path, owner in module.named_modules(remove_duplicate=False):
        for own in stores(owner):
            for name, tensor in own.items():
                if isinstance(tensor, torch.Tensor):
                    yield f"{path}.{name}" if path else name, tensor


@dataclass(frozen=True)
class Block:
    """A block on meta."""

    shape: BlockShape
    module: fx.GraphModule

    @property
    def parameter_bytes(self) -> int:
        return num_bytes(self.module)

    @property
    def scratch_bytes(self) -> int:
        """Of the largest convolution's weight, which oneDNN lays out anew while it computes."""
        weights = (weight for weight in self.module.parameters() if weight.dim() > 2)
        return max((weight.numel() * weight.element_size() for weight in weights), default=0)


@dataclass(frozen=True)
class Traced:
    """A module's blocks in their order, and one image of what it is given."""

    blocks: tuple[Block, ...]
    image_shape: tuple[int, ...]
    dtype: torch.dtype

    def given_to(self, index: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape of one image, and dtype, of what a block is given."""
        if index == 0:
            return self.image_shape, self.dtype
        before = self.blocks[index - 1].shape
        return before.out_shape, before.out_dtype

    def check_classifies(self) -> None:
        """ConfigError where it makes something else than a number a class."""
        made = self.blocks[-1].shape.out_shape
        if len(made) != 1:
            raise ConfigError(
                f"the module makes {list(made)} of an image; it must classify: [classes], a number each"
            )

    def block_at(self, name: str) -> int:
        """The block that begins at `name`, which may leave leading parts out (`layer3.0`)."""
        found = [
            index
            for index, block in enumerate(self.blocks)
            if index and any(f".{known}".endswith(f".{name}") for known in block.shape.aliases)
        ]
        if len(found) == 1:
            return found[0]
        legal = [block.shape.name for block in self.blocks[1:]]
        first = self.blocks[0].shape
        if found:
            problem = f"names {len(found)} points"
        elif any(f".{known}".endswith(f".{name}") for known in first.aliases) or name == first.name:
            problem = "is where the model begins"
        else:
            problem = (
                "is no point to cut at: it names no block, or more than one activation is alive there, or a "
                "BatchNorm or ReLU begins"
            )
        raise ConfigError(f"split point {name} {problem}; {_nearest(name, legal)}")


def _nearest(name: str, legal: Sequence[str]) -> str:
    """By as many last parts of the legal points as `name` has."""
    num_parts = name.count(".") + 1
    ends = {known: ".".join(known.split(".")[-num_parts:]) for known in legal}
    matches = get_close_matches(name, set(ends.values()), n=_NUM_NAMED)
    near = [known for match in matches for known in legal if ends[known] == match]
    if near:
        return f"the nearest that can be cut are {', '.join(near[:_NUM_NAMED])}"
    if len(legal) <= _NUM_NAMED:
        return f"that can be cut are {', '.join(legal) or 'none'}"
    return f"of {len(legal)} that can be cut the first are {', '.join(legal[:_NUM_NAMED])}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's own warnings, on deprecated parts of torch, and its pages of graph where a module cannot be
    traced: what is wrong is told in a line."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        was_disabled = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(was_disabled)


def trace(module: nn.Module, image_shape: Sequence[int], dtype: torch.dtype) -> Traced:
    """Cuts `module` (on meta, in eval mode) wherever it can be; ConfigError says why it cannot.

    `image_shape` is [channels, height, width].
    """
    example = torch.empty(_EXAMPLE_BATCH, *image_shape, dtype=dtype, device="meta")
    torch._dynamo.mark_dynamic(example, 0)
    cutter = Cutter(module)
    kind = type(module).__name__
    try:
        with torch.no_grad(), _quiet():
            pipe = pipeline(module, (example,), split_policy=cutter.split)
            stages = [flatten(pipe.get_stage_module(index)) for index in range(pipe.num_stages)]
    except Exception as error:  # whatever a foreign forward raises
        raise ConfigError(
            f"{kind} cannot be traced with images of {_text(image_shape)}: {_reason(error)}"
        ) from error
    if len(stages) != len(cutter.blocks):
        raise ConfigError(f"{kind} was split into {len(stages)} blocks, not {len(cutter.blocks)}")
    known = {name for name, _ in named_tensors(module)}
    for stage in stages:
        _check_tensors(stage, known, kind)
    return Traced(tuple(map(Block, cutter.blocks, stages)), tuple(image_shape), dtype)


def _check_tensors(block: fx.GraphModule, known: Set[str], kind: str) -> None:
    """ConfigError where nobody knows the values of a block's tensor."""
    for name, tensor in block.state_dict(keep_vars=True).items():
        if tensor.is_meta and own_name(name) not in known:
            raise ConfigError(
                f"{kind} uses a tensor {list(tensor.shape)} ({name}) that is no attribute of a module; "
                "register it as a buffer"
            )


def _reason(error: Exception) -> str:
    """In one line."""
    cause = str(error.__cause__ or error).strip() or type(error).__name__
    if cause.startswith("Constraints violated"):
        return "it makes a constant of the batch size, as len(x) does; use x.shape[0]"
    return cause.splitlines()[0]


def _text(image_shape: Sequence[int]) -> str:
    return "x".join(map(str, image_shape))
