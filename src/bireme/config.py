"""Frozen settings of a run, validated where they are made and never written back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Literal, get_args

from bireme.errors import ConfigError

DType = Literal["auto", "float32", "float16", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]
LoadFormat = Literal["auto", "dummy"]
Transport = Literal["auto", "distributed"]

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def parse_bytes(text: str) -> int:
    """Bytes of '16MiB', '24 GB', '1.5GiB' or '4096B' (SI prefixes are powers of ten)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not match or (match[3] and not match[2]):
        raise ConfigError(f"memory size {text!r} is not a size; write it like 16MiB or 24GB")
    power = "KMGT".find(match[2].upper()) + 1 if match[2] else 0
    if text.strip()[-1].isdigit():
        raise ConfigError(f"memory size {text!r} has no unit; write it like 16MiB or 24GB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def format_bytes(num_bytes: float) -> str:
    """A size for people: '13.6 MiB'."""
    for unit in ("B", "KiB", "MiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    if abs(num_bytes) < 1024:
        return f"{num_bytes:.2f} GiB"
    return f"{num_bytes / 1024:.2f} TiB"


def parse_ints(text: str, what: str, least: int = 1) -> tuple[int, ...]:
    """'3,2' -> (3, 2); ConfigError where a number is missing or under `least`."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"{what} {text!r} is not a whole number, or a list of them like 3,2"
        ) from None
    if min(values) < least:
        wrong = f"holds {min(values)}" if len(values) > 1 else "is too small"
        raise ConfigError(f"{what} {text} {wrong}; the smallest is {least}")
    return values


_MOST_WHOLE = 2**63 - 1  # what a message can carry


def _check_whole(name: str, value: object, least: int) -> None:
    if type(value) is not int:
        raise ConfigError(f"{name}={value!r} must be a whole number")
    if not least <= value <= _MOST_WHOLE:
        bound = f"at least {least}" if value < least else f"at most {_MOST_WHOLE}"
        raise ConfigError(f"{name}={value} must be {bound}")


def _check_list(name: str, values: object, least: int) -> None:
    if not isinstance(values, list | tuple):
        raise ConfigError(f"{name}={values!r} must be a tuple of whole numbers")
    for value in values:
        _check_whole(name, value, least)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is cut: one tensor-parallel width a stage, and which layers a stage holds.

    `layers_per_stage` None means balanced by cost.
    """

    widths: tuple[int, ...] = (1,)
    layers_per_stage: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_list("tensor_parallel_size", self.widths, 1)
        if not self.widths:
            raise ConfigError("tensor_parallel_size names no stage; give at least one width")
        given = self.layers_per_stage
        if given is None:
            return
        _check_list("layers_per_stage", given, 1)
        if len(given) != len(self.widths):
            raise ConfigError(
                f"layers_per_stage {','.join(map(str, given))} names {len(given)} stages, "
                f"but there are {len(self.widths)}; give one number a stage"
            )

    @classmethod
    def of(
        cls,
        tensor_parallel_size: int | tuple[int, ...] = 1,
        pipeline_parallel_size: int | None = None,
        layers_per_stage: tuple[int, ...] | None = None,
    ) -> ParallelConfig:
        """From the two sizes; a tuple of widths is one a stage and implies the number of stages."""
        widths = tensor_parallel_size
        if not isinstance(widths, tuple) or len(widths) == 1:
            width = widths[0] if isinstance(widths, tuple) else widths
            stages = pipeline_parallel_size
            if stages is None:
                stages = len(layers_per_stage) if layers_per_stage else 1
            _check_whole("pipeline_parallel_size", stages, 1)
            widths = (width,) * stages
        elif pipeline_parallel_size not in (None, len(widths)):
            raise ConfigError(
                f"tensor_parallel_size {','.join(map(str, widths))} names {len(widths)} stages, but "
                f"pipeline_parallel_size is {pipeline_parallel_size}; give one width a stage"
            )
        return cls(widths=widths, layers_per_stage=layers_per_stage)

    @property
    def world_size(self) -> int:
        return sum(self.widths)

    @property
    def pp_size(self) -> int:
        return len(self.widths)

    def __str__(self) -> str:
        if len(set(self.widths)) == 1:
            return f"tp {self.widths[0]} x pp {self.pp_size}"
        return f"tp {','.join(map(str, self.widths))} (pp {self.pp_size})"


_CHOICES = {"dtype": DType, "device": Device, "load_format": LoadFormat, "transport": Transport}
_LEAST = {
    "seed": 0,
    "block_size": 1,
    "max_model_len": 1,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "memory_limit_bytes": 1,
    "workspace_bytes": 1,
    "max_num_waiting": 1,
    "max_num_waiting_tokens": 0,
}
_FLAGS = ("enable_prefix_caching", "deterministic", "enforce_eager")
_MOST = {"gpu_memory_utilization": 1.0, "step_timeout_s": 1e6, "start_timeout_s": 1e6}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that a run needs beside the model: limits, device and formats.

    `memory_limit_bytes` bounds the tensors of one rank; None means what the device has.
    `workspace_bytes` bounds what attention and sampling hold for a moment (one sequence's context
    in one layer apart).
    `max_num_waiting` bounds the queue, beside the `max_num_seqs` that run, and
    `max_num_waiting_tokens` what its prompts hold. `deterministic` gives a request the same logits,
    bit by bit, whatever else runs and however its tokens were split over steps.
    `enforce_eager`: launch each kernel, without CUDA graphs.
    `transport` auto is shared memory between the CPUs of a host, else torch.distributed.
    `devices` maps rank i to CUDA device devices[i]; None means rank i on device i.
    """

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    dtype: DType = "auto"
    device: Device = "auto"
    devices: tuple[int, ...] | None = None
    load_format: LoadFormat = "auto"
    transport: Transport = "auto"
    seed: int = 0
    block_size: int = 16
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    gpu_memory_utilization: float = 0.9
    memory_limit_bytes: int | None = None
    workspace_bytes: int = 32 * 1024 * 1024
    enable_prefix_caching: bool = True
    max_num_waiting: int = 8192
    max_num_waiting_tokens: int = 4 * 1024 * 1024
    deterministic: bool = False
    enforce_eager: bool = False
    step_timeout_s: float = 300.0
    start_timeout_s: float = 900.0

    def __post_init__(self) -> None:
        for name, literal in _CHOICES.items():
            value, known = getattr(self, name), get_args(literal)
            if value not in known:
                raise ConfigError(f"{name} {value!r} is not known; use {', '.join(known)}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None or getattr(type(self), name) is not None:
                _check_whole(name, value, least)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be true or false")
        for name, most in _MOST.items():
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value <= most:
                raise ConfigError(f"{name}={value!r} must be a number above 0, at most {most:g}")
        if self.devices is not None:
            self._check_devices(self.devices)

    @property
    def most_requests(self) -> int:
        """That are there at once, running or waiting."""
        return self.max_num_seqs + self.max_num_waiting

    def most_tokens(self, max_model_len: int) -> int:
        """Of the prompts that are there at once; each that runs may fill the context."""
        return self.max_num_seqs * max_model_len + self.max_num_waiting_tokens

    def _check_devices(self, devices: Sequence[int]) -> None:
        _check_list("devices", devices, 0)
        world = self.parallel.world_size
        if len(devices) != world:
            raise ConfigError(
                f"devices {','.join(map(str, devices))} names {len(devices)} devices "
                f"for {world} ranks; give one a rank"
            )


def check_settings(given: Iterable[str], own: Iterable[str]) -> None:
    """ConfigError for the first name that is neither one of `own` nor a field of `EngineConfig`."""
    known = [*own, *(item.name for item in fields(EngineConfig) if item.name != "parallel")]
    for name in given:
        if name not in known:
            closest = get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"there is no setting {name}; the closest one is {closest}")
