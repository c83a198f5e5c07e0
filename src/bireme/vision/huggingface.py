"""What transformers knows of vision models: the one file here that imports it, when it is needed.

Its modules are built on meta; their weights are read by us, under the names that its checkpoints
have in their files.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bireme.errors import CheckpointError, ConfigError
from bireme.hf_config import read_json

if TYPE_CHECKING:
    from torch import nn

_BASIC, _BOTTLENECK = (64, 128, 256, 512), (256, 512, 1024, 2048)
_RESNETS = {
    "resnet-18": ("basic", (2, 2, 2, 2)),
    "resnet-34": ("basic", (3, 4, 6, 3)),
    "resnet-50": ("bottleneck", (3, 4, 6, 3)),
    "resnet-101": ("bottleneck", (3, 4, 23, 3)),
    "resnet-152": ("bottleneck", (3, 8, 36, 3)),
}
_VITS = {"vit-b16": (768, 12, 12), "vit-l16": (1024, 24, 16)}  # hidden size, layers, heads
SHAPES = (*_RESNETS, *_VITS)
_NUM_CLASSES = 1000


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "ResNet and ViT come from transformers; pip install 'bireme[vision]'"
        ) from None
    return transformers


def from_shapes(name: str, image_size: int) -> nn.Module:
    """A published model by its name in `SHAPES`, on the default device."""
    library = _transformers()
    if name in _RESNETS:
        kind, depths = _RESNETS[name]
        config = library.ResNetConfig(
            layer_type=kind,
            depths=list(depths),
            hidden_sizes=list(_BASIC if kind == "basic" else _BOTTLENECK),
            num_labels=_NUM_CLASSES,
        )
    else:
        hidden_size, num_layers, num_heads = _VITS[name]
        if image_size % 16:
            raise ConfigError(f"image_size={image_size} must be a multiple of {name}'s patch of 16")
        config = library.ViTConfig(
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            intermediate_size=4 * hidden_size,
            image_size=image_size,
            num_labels=_NUM_CLASSES,
        )
    return _classifier(config)


def from_folder(folder: Path) -> nn.Module:
    """The module of a folder's config.json, on the default device, without its weights."""
    library = _transformers()
    try:
        return _classifier(library.AutoConfig.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: {str(error).strip().splitlines()[0]}") from None


def _classifier(config: Any) -> nn.Module:
    module: nn.Module = _transformers().AutoModelForImageClassification.from_config(config)
    return module


def is_classifier(folder: Path) -> bool:
    """True where config.json says that the folder's model classifies images."""
    if not (folder / "config.json").is_file():
        return False
    config = read_json(folder / "config.json")
    names = config.get("architectures")
    if isinstance(names, list) and names:
        return str(names[0]).endswith("ForImageClassification")
    return config.get("model_type") in ("resnet", "vit")


def image_size(folder: Path) -> int | None:
    """Pixels on a side that the module takes alone, as a ViT does; None: any."""
    size = read_json(folder / "config.json").get("image_size")
    return size if isinstance(size, int) else None


def labels(folder: Path) -> dict[int, str]:
    found = read_json(folder / "config.json").get("id2label") or {}
    return {int(index): str(label) for index, label in found.items()}


def file_names(module: nn.Module, in_files: Iterable[str]) -> dict[str, str]:
    """The module's names of the tensors that its checkpoint's files call `in_files`."""
    if not hasattr(module, "base_model_prefix"):
        return {name: name for name in in_files}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(module)
    converters = [it for it in transforms if isinstance(it, WeightConverter)]
    renamings = [it for it in transforms if not isinstance(it, WeightConverter)]
    own, prefix = module.state_dict(), module.base_model_prefix
    found: dict[str, str] = {}
    for name in in_files:
        renamed, converted_by = rename_source_key(name, renamings, converters, prefix, own)
        if converted_by is not None:
            raise CheckpointError(
                f"{name} is stored in another form than {type(module).__name__} holds it; "
                "save the checkpoint anew with transformers 5"
            )
        found[renamed] = name
    return found
