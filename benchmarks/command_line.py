"""What benchmarks are asked for: what cannot be is refused in a line, before anything is measured."""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Iterable, Sequence

import torch
from gpu_floors import CONFIGS, model_folder, numbers

from bireme.checkpoint.prepared import prepare_model
from bireme.errors import UserError


def parser_of(description: str) -> argparse.ArgumentParser:
    """That tells the first paragraph of a program's docstring."""
    return argparse.ArgumentParser(description=description.partition("\n\n")[0])


def shape_parser(
    description: str,
    layouts: Sequence[str] = ("1,1", "2,1", "1,2"),
    batches: str = "1,8,32,64,128",
) -> argparse.ArgumentParser:
    """Of a program that measures a shape at these layouts and batches where it is not told others."""
    parser = parser_of(description)
    parser.add_argument("--name", default="gpu")
    parser.add_argument(
        "--model", type=shape, default="llama-2-7b", help="of examples/configs, or a folder"
    )
    parser.add_argument("--layouts", nargs="+", type=layout, metavar="TP,PP", default=[*layouts])
    parser.add_argument("--batches", type=counts, default=batches)
    return parser


def count(text: str) -> int:
    """At least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def counts(text: str) -> str:
    """One or several with commas between them."""
    for part in text.split(","):
        count(part)
    return text


def layout(text: str) -> str:
    """TP,PP"""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no TP,PP like 2,1")
    return text


def shape(text: str) -> str:
    """A model's configuration; its weights are made up."""
    try:
        prepare_model(model_folder(text), needs_weights=False)
    except UserError as error:
        names = ", ".join(sorted(it.name for it in CONFIGS.iterdir() if it.is_dir()))
        raise argparse.ArgumentTypeError(f"{error}; or one of {names}") from None
    return text


def interpreter(text: str) -> str:
    if shutil.which(text) is None:
        raise argparse.ArgumentTypeError(f"{text} is no program here")
    return text


def need_gpus(parser: argparse.ArgumentParser, most: int = 1, layouts: Iterable[str] = ()) -> None:
    """Ends the program where there are fewer than `most`, or than one of the layouts needs."""
    here = torch.cuda.device_count()
    if not here:
        parser.error("there is no GPU")
    for it in layouts:
        if (needed := math.prod(numbers(it))) > here:
            parser.error(f"{it} needs {needed} GPUs; {here} are here")
    if most > here:
        parser.error(f"it needs {most} GPUs; {here} are here")
