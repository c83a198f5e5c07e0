"""Checkpoints of every awkward kind, written by hand: random bits under the names of a family.

Nothing here uses the writer or the views that are under test.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bireme.checkpoint.artifact import Artifact
from bireme.checkpoint.loader import load_parameters
from bireme.checkpoint.names import NameMap
from bireme.checkpoint.opener import match_source, open_folder
from bireme.checkpoint.pickled import PickledCheckpoint
from bireme.checkpoint.prepared import prepare_model, shard_model
from bireme.checkpoint.reader import ITEM_BYTES, Checkpoint, TensorSource, bits_dtype
from bireme.config import ParallelConfig
from bireme.hf_config import from_hf
from bireme.model_config import ModelConfig
from bireme.models.blocks import StageModel
from bireme.models.registry import build_stage, model_layout, partition_layers
from bireme.parallel.boxes import as_slices
from bireme.parallel.layers import named_layouts
from bireme.parallel.layout import ModelLayout, Source
from bireme.parallel.mesh import Mesh

_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
Tensors = dict[str, tuple[str, np.ndarray]]  # name -> (safetensors dtype, bits as in the file)

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 200,
    "hidden_size": 48,
    "intermediate_size": 90,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 150,
    "n_embd": 40,
    "n_layer": 4,
    "n_head": 5,
    "n_positions": 32,
}
BLOOM = {
    "architectures": ["BloomForCausalLM"],
    "model_type": "bloom",
    "vocab_size": 150,
    "hidden_size": 48,
    "n_layer": 4,
    "n_head": 6,
}
NEOX = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "vocab_size": 150,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
MIXTRAL = {
    **LLAMA,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
}
PHI3 = {**LLAMA, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}


@dataclass(frozen=True)
class Recipe:
    """A source folder: its config, and what is odd about it.

    `prefix` replaces the family's own in the files; `order` sorts the tensors of a file; `change`
    has the last word on them.
    """

    config: Mapping[str, Any] = field(default_factory=lambda: LLAMA)
    dtype: str = "BF16"
    prefix: tuple[str, str] | None = None
    extra: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    order: Callable[[str], Any] = str
    metadata: Mapping[str, str] | None = field(default_factory=lambda: {"format": "pt"})
    num_files: int = 1
    others: Mapping[str, bytes] = field(default_factory=dict)
    change: Callable[[Tensors], Tensors] = lambda tensors: tensors
    seed: int = 0

    @property
    def hf_config(self) -> dict[str, Any]:
        return {**self.config, "torch_dtype": _TORCH_NAMES[self.dtype]}

    @property
    def model(self) -> ModelConfig:
        return from_hf(self.hf_config)

    def tensors(self) -> Tensors:
        """Random bits (NaNs among them: nothing here may interpret a number)."""
        layout = model_layout(self.model, ParallelConfig())
        shapes = {
            self._in_file(name): source.view.file_shape(source.shape)
            for name, source in layout.sources.items()
        }
        kinds = {name: (self.dtype, shape) for name, shape in shapes.items()} | dict(self.extra)
        random = np.random.default_rng(self.seed)
        return self.change(
            {
                name: (dtype, random_bits(random, dtype, kinds[name][1]))
                for name in sorted(kinds, key=self.order)
                for dtype in [kinds[name][0]]
            }
        )

    def _in_file(self, name: str) -> str:
        if self.prefix and name.startswith(self.prefix[0]):
            return self.prefix[1] + name.removeprefix(self.prefix[0])
        return name

    def write(self, folder: Path) -> Tensors:
        """Makes the folder; returns what is in its files."""
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.hf_config, indent=2) + "\n")
        for name, data in self.others.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        tensors = self.tensors()
        if self.num_files == 1:
            write_safetensors(folder / "model.safetensors", tensors, self.metadata)
            return tensors
        names, weight_map = list(tensors), {}
        edges = [len(names) * part // self.num_files for part in range(self.num_files + 1)]
        for part, (first, last) in enumerate(pairwise(edges), start=1):
            file = f"model-{part:05d}-of-{self.num_files:05d}.safetensors"
            part_tensors = {name: tensors[name] for name in names[first:last]}
            write_safetensors(folder / file, part_tensors, self.metadata)
            weight_map |= dict.fromkeys(part_tensors, file)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return tensors


def random_bits(random: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    return np.frombuffer(random.bytes(num_bytes), bits_dtype(dtype)).reshape(shape)


def write_safetensors(
    path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None
) -> None:
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, (dtype, bits) in tensors.items():
        table[name] = {
            "data_offsets": [at, at + bits.nbytes],  # keys in another order than ours
            "dtype": dtype,
            "shape": list(bits.shape),
        }
        at += bits.nbytes
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    data = b"".join(bits.tobytes() for _, bits in tensors.values())
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


# --- what one does with them --------------------------------------------------------------------

Widths = Sequence[int]


def layout_of(model: ModelConfig, widths: Widths) -> ModelLayout:
    return model_layout(model, ParallelConfig.of(tuple(widths), len(widths)))


def matched(
    source: Checkpoint | Artifact | PickledCheckpoint, model: ModelConfig, widths: Widths
) -> tuple[ModelLayout, NameMap]:
    layout = layout_of(model, widths)
    names = match_source(source, layout, model)
    return layout, names


def shard_folder(folder: Path, out: Path, widths: Widths) -> Artifact:
    shard_model(folder, out, ParallelConfig.of(tuple(widths), len(widths)))
    return Artifact(out)


def load_rank(
    source: TensorSource, names: NameMap, model: ModelConfig, widths: Widths, rank: int
) -> tuple[StageModel, int]:
    """One rank's stage as its worker makes it, every byte set to 0xAB before it is filled; and how
    many bytes of the source that took."""
    mesh = Mesh(tuple(widths), rank)
    spec = partition_layers(model, ParallelConfig(widths=tuple(widths)))[mesh.stage]
    with torch.device("meta"):
        stage = build_stage(model, mesh, spec)
    stage.to(getattr(torch, model.dtype))
    for _, module, attribute, _ in named_layouts(stage):
        empty = torch.empty_like(getattr(module, attribute), device="cpu")
        empty.view(torch.uint8).fill_(0xAB)
        setattr(module, attribute, torch.nn.Parameter(empty, requires_grad=False))
    return stage, load_parameters(stage, source, names, num_threads=4)


def logical(bits: np.ndarray, source: Source) -> np.ndarray:
    """The whole logical tensor from what is in the file, by plain numpy."""
    view = source.view
    if view.kind == "transpose":
        return bits.T
    if view.kind == "interleave":
        by_head = bits.reshape(-1, view.num_parts, view.unit, *bits.shape[1:])
        return by_head.swapaxes(0, 1).reshape(bits.shape)
    return bits


def check_parameters(stage: StageModel, names: NameMap, tensors: Tensors) -> None:
    """Every parameter holds the source's bits, and zeros where it is padded."""
    for name, module, attribute, layout in named_layouts(stage):
        parameter = getattr(module, attribute)
        found = parameter.view({2: torch.uint16, 4: torch.uint32}[parameter.element_size()]).numpy()
        expected = np.zeros_like(found)
        for piece in layout.pieces:
            dtype, bits = tensors[names.in_file(piece.source.name)]
            assert ITEM_BYTES[dtype] == found.itemsize
            whole = logical(bits, piece.source)
            target = expected[as_slices(piece.local)]
            target[...] = whole[as_slices(piece.box)].reshape(target.shape)
        assert np.array_equal(found, expected), name


def check_every_rank(folder: Path, widths: Widths, tensors: Tensors) -> None:
    """Loads the folder at a layout, each rank by itself."""
    model = prepare_model(str(folder)).config
    for rank in range(sum(widths)):
        source = open_folder(folder, rank)
        _, names = matched(source, model, widths)
        stage, num_bytes = load_rank(source, names, model, widths, rank)
        check_parameters(stage, names, tensors)
        if isinstance(source, Artifact):
            assert num_bytes == source.stats.needed
            assert source.stats.needed <= source.stats.fetched == source.stats.verified


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
