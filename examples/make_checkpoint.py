"""Writes a checkpoint of made-up weights in the shape of any config.json, to try things at full size.

    python examples/make_checkpoint.py examples/configs/llama-2-7b OUT

The result is an ordinary Hugging Face folder: config.json and bfloat16 safetensors files of about
4 GB with an index. The weights are those of `--load-format dummy`: a function of each tensor's name.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from bireme.checkpoint.dummy import DummySource
from bireme.checkpoint.prepared import prepare_model
from bireme.checkpoint.reader import copy_view
from bireme.config import ParallelConfig
from bireme.models.registry import model_layout
from bireme.parallel.layout import Source, full_box

FILE_BYTES = 4_000_000_000


def make_tensor(source: Source, numbers: DummySource) -> torch.Tensor:
    """The tensor as its file holds it."""
    values, in_file = torch.empty(source.shape), source.inverse
    numbers.read(source, full_box(source.shape), values.view(torch.uint32).numpy())
    bits = values.to(torch.bfloat16).view(torch.uint16).numpy()
    out = np.empty(in_file.shape, dtype=bits.dtype)
    copy_view(bits, in_file, full_box(in_file.shape), out)
    return torch.from_numpy(out).view(torch.bfloat16)


def files_of(sources: list[Source]) -> list[list[Source]]:
    """Tensors in their order, in files of at most about 4 GB."""
    files: list[list[Source]] = [[]]
    num_bytes = 0
    for source in sources:
        size = 2 * math.prod(source.shape)
        if num_bytes + size > FILE_BYTES and files[-1]:
            files.append([])
            num_bytes = 0
        files[-1].append(source)
        num_bytes += size
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", type=Path, help="a folder with a config.json")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = prepare_model(str(arguments.config), needs_weights=False)
    sources = model_layout(model.config, ParallelConfig()).sources
    numbers = DummySource(sources, arguments.seed)
    arguments.out.mkdir(parents=True)
    shutil.copyfile(model.folder / "config.json", arguments.out / "config.json")
    files = files_of(list(sources.values()))
    weight_map = {}
    for index, members in enumerate(files, 1):
        name = f"model-{index:05d}-of-{len(files):05d}.safetensors"
        tensors = {source.name: make_tensor(source, numbers) for source in members}
        save_file(tensors, arguments.out / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        print(f"{arguments.out / name}: {len(tensors)} tensors", flush=True)
    index_json = {"metadata": {}, "weight_map": weight_map}
    (arguments.out / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=1))


if __name__ == "__main__":
    main()
