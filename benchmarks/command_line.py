"""What benchmarks are asked for: what cannot be is refused in a line, before anything is measured."""

from __future__ import annotations

import argparse
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

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
    add_name(parser)
    parser.add_argument(
        "--model", type=shape, default="llama-2-7b",
        help="of examples/configs, or a folder, as those in benchmarks/shapes",
    )  # fmt: skip
    parser.add_argument("--layouts", nargs="+", type=layout, metavar="TP,PP", default=[*layouts])
    parser.add_argument("--batches", type=counts, default=batches, metavar="N,N,...")
    return parser


def add_name(parser: argparse.ArgumentParser, default: str = "gpu") -> None:
    parser.add_argument(
        "--name", type=name, default=default,
        help=f"what the kept result's file is called by, in benchmarks/results ({default})",
    )  # fmt: skip


def name(text: str) -> str:
    """Part of a file's name."""
    if not re.fullmatch(r"[\w.-]*", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of letters, digits, '-', '_' and '.' alone"
        )
    return text


def count(text: str) -> int:
    """At least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def counts(text: str) -> str:
    """One or several with commas between them."""
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole numbers from 1 on, like 1,8")
    return text


def layout(text: str) -> str:
    """TP,PP"""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no TP,PP like 2,1, each from 1 on")
    return text


def shape(text: str) -> str:
    """A model's configuration; its weights are made up."""
    try:
        prepare_model(model_folder(text), needs_weights=False)
    except UserError as error:
        names = ", ".join(sorted(it.name for it in CONFIGS.iterdir() if it.is_dir()))
        others = "" if Path(text).exists() else f"; or one of {names}"
        raise argparse.ArgumentTypeError(f"{error}{others}") from None
    return text


def interpreter_with(package: str) -> Callable[[str], str]:
    """Of Python, that has a peer's package."""
    looks = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"

    def interpreter(text: str) -> str:
        if shutil.which(text) is None:
            raise argparse.ArgumentTypeError(f"{text} is no program here")
        if subprocess.run([text, "-c", looks], capture_output=True, check=False).returncode:
            raise argparse.ArgumentTypeError(f"{text} has no {package}")
        return text

    return interpreter


def need_gpus(parser: argparse.ArgumentParser, most: int = 1, layouts: Iterable[str] = ()) -> None:
    """Ends the program where there are fewer than `most`, or than one of the layouts needs."""
    here = torch.cuda.device_count()
    takers = [("this script", most), *((f"layout {it}", math.prod(numbers(it))) for it in layouts)]
    what, needed = max(takers, key=lambda one: one[1])
    if needed > here:
        parser.error(f"{what} takes {needed} GPU{'s' * (needed > 1)}; torch sees {here} here")
