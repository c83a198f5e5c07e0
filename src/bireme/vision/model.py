"""A vision model by its name: its module on meta, its weights, what its images must be.

A local folder in the format of transformers; a published model like `resnet-50`; `torchvision:NAME` or
`timm:NAME`, where these are installed; or `module:factory`. All but the first have made-up weights,
unless a folder of safetensors files with the module's own names is given beside.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from bireme.checkpoint.reader import Checkpoint
from bireme.config import DTYPE_BYTES
from bireme.errors import ConfigError
from bireme.vision import huggingface
from bireme.vision.preprocessing import Preprocessing

DEFAULT_IMAGE_SIZE = 224
_FILE_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class VisionModel(msgspec.Struct, frozen=True):
    """What every rank must know to build the same module; `weights` is a folder, None: made up."""

    kind: Literal["folder", "config", "torchvision", "timm", "factory"]
    name: str
    weights: str | None
    image_size: int
    dtype: str
    seed: int = 0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 3, self.image_size, self.image_size

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def build(self, device: str = "meta") -> nn.Module:
        """To classify; ConfigError where it cannot be made."""
        try:
            with torch.device(device):
                module = self._make()
        except ConfigError:
            raise
        except Exception as error:  # whatever foreign code raises
            what = f"{type(error).__name__}: {str(error).strip() or 'without a word'}"
            raise ConfigError(f"{self.name} cannot be made: {what.splitlines()[0]}") from error
        if not isinstance(module, nn.Module):
            raise ConfigError(f"{self.name} makes a {type(module).__name__}, not an nn.Module")
        return module.to(device=device, dtype=self.torch_dtype).eval()

    def build_constants(self) -> nn.Module:
        """On the host for what its constructor computes: parameters are on meta, so that none is drawn
        or held. Random constants are the same in every process."""
        hook = register_module_parameter_registration_hook(_on_meta)
        try:
            with torch.device("cpu"), torch.random.fork_rng(devices=()):
                torch.manual_seed(self.seed)
                module: nn.Module = self._make()
        finally:
            hook.remove()
        return module.to(dtype=self.torch_dtype)

    def _make(self) -> Any:
        if self.kind == "folder":
            return huggingface.from_folder(Path(self.name))
        if self.kind == "config":
            return huggingface.from_shapes(self.name, self.image_size)
        return _factory(self.kind, self.name)()

    @property
    def preprocessing(self) -> Preprocessing:
        folder = Path(self.name) if self.kind == "folder" else None
        return Preprocessing.of(folder, self.image_size)

    @property
    def labels(self) -> dict[int, str]:
        """Of the classes, where the checkpoint has them."""
        return huggingface.labels(Path(self.name)) if self.kind == "folder" else {}


def _on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
    if parameter is None or parameter.is_meta:
        return parameter
    return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)


def find_model(
    name: str | None,
    config: str | None = None,
    weights: Path | None = None,
    *,
    image_size: int | None = None,
    dtype: str = "auto",
) -> VisionModel:
    """The model that the command line names; ConfigError says what can be named."""
    if (name is None) == (config is None):
        raise ConfigError("give either MODEL or --config NAME, to say what to run")
    if dtype not in ("auto", *DTYPE_BYTES):
        raise ConfigError(f"dtype {dtype!r} is not known; use auto, {', '.join(DTYPE_BYTES)}")
    if name in huggingface.SHAPES and not Path(str(name)).is_dir():
        name, config = None, name
    if image_size is not None and image_size < 1:
        raise ConfigError(f"image_size={image_size} must be at least 1")
    size, kind, home = image_size, _kind(name), weights
    if config is not None:
        kind, name = "config", _known_config(config)
    elif kind == "folder":
        home, size = weights or Path(str(name)), _folder_size(Path(str(name)), image_size)
    found = dtype if dtype != "auto" else "float32" if home is None else _dtype_of(home)
    return VisionModel(
        kind,
        str(name),
        str(home) if home else None,
        DEFAULT_IMAGE_SIZE if size is None else size,
        found,
    )


def _kind(name: str | None) -> Any:
    if name is None or Path(name).is_dir():
        return "folder"
    library, colon, _ = name.partition(":")
    if not colon:
        near = get_close_matches(name, huggingface.SHAPES, n=1)
        hint = f"did you mean {near[0]}; or give" if near else "give"
        raise ConfigError(
            f"{name} is no folder; {hint} a folder, a name like resnet-50, torchvision:NAME, timm:NAME or "
            "module:factory"
        )
    return library if library in ("torchvision", "timm") else "factory"


def _known_config(name: str) -> str:
    if name not in huggingface.SHAPES:
        nearest = get_close_matches(name, huggingface.SHAPES, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"there is no config {name}; the closest is {nearest}, and known are "
            f"{', '.join(huggingface.SHAPES)}"
        )
    return name


def _folder_size(folder: Path, given: int | None) -> int | None:
    """Pixels on a side: what the module takes alone, or was asked for, or is preprocessed to."""
    fixed = huggingface.image_size(folder)
    if fixed is not None and given not in (None, fixed):
        raise ConfigError(
            f"image_size={given} is not what {folder} takes; leave it out, or give {fixed}"
        )
    return fixed or given or Preprocessing.of(folder, DEFAULT_IMAGE_SIZE).side


def _dtype_of(folder: Path) -> str:
    """Of the checkpoint's first tensor of floating-point numbers."""
    dtypes = (info.dtype for info in Checkpoint(folder).tensors.values())
    return next((_FILE_DTYPES[dtype] for dtype in dtypes if dtype in _FILE_DTYPES), "float32")


def _factory(kind: str, name: str) -> Callable[[], Any]:
    module_name, _, attribute = name.partition(":")
    if kind == "torchvision":
        get_model = _imported("torchvision.models", name).get_model
        return lambda: get_model(attribute, weights=None)
    if kind == "timm":
        create = _imported("timm", name).create_model
        return lambda: create(attribute, pretrained=False)
    if str(Path.cwd()) not in sys.path:  # as `python -m` would find it
        sys.path.insert(0, str(Path.cwd()))
    factory = getattr(_imported(module_name, name), attribute, None)
    if not callable(factory):
        raise ConfigError(f"{name}: module {module_name} has no function {attribute}")
    made: Callable[[], Any] = factory
    return made


def _imported(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{name} needs the module {module}: {error}") from None
