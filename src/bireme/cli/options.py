"""Options that several subcommands share, and what they become."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from bireme.config import ParallelConfig, parse_bytes, parse_ints
from bireme.errors import ConfigError, RequestError

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, `demo`, or a Hugging Face Hub id.")
]
_WIDTHS = "Ranks that share each layer; 3,2 gives one width a stage"
TensorParallel = Annotated[
    str, typer.Option("--tensor-parallel-size", "-tp", metavar="N", help=f"{_WIDTHS}.")
]
TensorParallelOrAuto = Annotated[
    str,
    typer.Option(
        "--tensor-parallel-size",
        "-tp",
        metavar="N",
        help=f"{_WIDTHS}; auto takes the smallest fit.",
    ),
]
PipelineParallel = Annotated[
    int | None,
    typer.Option(
        "--pipeline-parallel-size",
        "-pp",
        metavar="N",
        help="Stages of consecutive layers. [default: 1]",
    ),
]
LayersPerStage = Annotated[
    str | None,
    typer.Option(
        "--layers-per-stage",
        metavar="3,3,2",
        help="Layers of each stage; balanced by cost if not given.",
    ),
]
DTypeOption = Annotated[
    str, typer.Option("--dtype", help="auto (the checkpoint's), float32, float16 or bfloat16.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Devices = Annotated[
    str | None,
    typer.Option("--devices", metavar="1,0", help="The GPU of each rank, in rank order."),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        "--memory-limit",
        metavar="SIZE",
        help="What one rank's tensors may take, like 16MiB or 24GB.",
    ),
]
LoadFormat = Annotated[
    str,
    typer.Option(
        "--load-format", help="auto, or dummy: made-up weights, only config.json is needed."
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        "--max-model-len",
        metavar="N",
        help="The longest context in tokens; the model's own if not given.",
    ),
]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option("--max-num-seqs", metavar="N", help="Requests that run at once. [default: 64]"),
]
MaxNumBatchedTokens = Annotated[
    int | None,
    typer.Option(
        "--max-num-batched-tokens", metavar="N", help="Tokens of a step at most. [default: 2048]"
    ),
]
PrefixCaching = Annotated[
    bool,
    typer.Option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        help="Share what prompts that begin alike have in common.",
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="The same logits bit by bit, whatever else runs; slower.",
    ),
]
EnforceEager = Annotated[
    bool,
    typer.Option(
        "--enforce-eager", help="On GPUs: launch each kernel, without CUDA graphs; slower."
    ),
]
GpuMemoryUtilization = Annotated[
    float,
    typer.Option(
        "--gpu-memory-utilization",
        help="The share of each device's free memory to use; of the host's for CPU ranks.",
    ),
]
BlockSize = Annotated[
    int, typer.Option("--block-size", metavar="N", help="Tokens of a block of the cache.")
]
MaxNumWaiting = Annotated[
    int, typer.Option("--max-num-waiting", metavar="N", help="Requests that may wait at most.")
]
MaxNumWaitingTokens = Annotated[
    int,
    typer.Option(
        "--max-num-waiting-tokens",
        metavar="N",
        help="Tokens of their prompts at most, all together.",
    ),
]
_ADDRESS = re.compile(r"([\w.-]+|\[[\da-fA-F:]+\]):\d+(/\S*)?")
Seed = Annotated[int, typer.Option("--seed", help="Of made-up weights.")]
JsonOutput = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
MOST_SECONDS = 3600  # of the past
PastSeconds = Annotated[
    float, typer.Option("--seconds", metavar="S", help="Of a server: how much of the past.")
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", metavar="KEY", envvar="OPENAI_API_KEY", help="The server's."),
]
ShowLedger = Annotated[
    bool,
    typer.Option("--ledger", help="Then show, on standard error, where each rank's time went."),
]


@dataclass(frozen=True)
class EngineOptions:
    """How a model is cut, and what its engine may take: the same for every command that runs one."""

    tp: TensorParallelOrAuto = "1"
    pp: PipelineParallel = None
    layers_per_stage: LayersPerStage = None
    dtype: DTypeOption = "auto"
    device: Device = "auto"
    devices: Devices = None
    memory_limit: MemoryLimit = None
    load_format: LoadFormat = "auto"
    max_model_len: MaxModelLen = None
    max_num_seqs: MaxNumSeqs = None
    max_num_batched_tokens: MaxNumBatchedTokens = None
    prefix_caching: PrefixCaching = True
    deterministic: Deterministic = False
    enforce_eager: EnforceEager = False

    def keywords(self) -> dict[str, Any]:
        """Of `LLM`."""
        return {
            **parallel_settings(self.tp, self.pp, self.layers_per_stage),
            **engine_config(
                devices=self.devices,
                memory_limit=self.memory_limit,
                dtype=self.dtype,
                device=self.device,
                load_format=self.load_format,
                max_model_len=self.max_model_len,
                max_num_seqs=self.max_num_seqs,
                max_num_batched_tokens=self.max_num_batched_tokens,
                enable_prefix_caching=self.prefix_caching,
                deterministic=self.deterministic,
                enforce_eager=self.enforce_eager,
            ),
        }


@dataclass(frozen=True)
class CacheOptions:
    """What a server's engine may take beside."""

    gpu_memory_utilization: GpuMemoryUtilization = 0.9
    block_size: BlockSize = 16
    max_num_waiting: MaxNumWaiting = 8192
    max_num_waiting_tokens: MaxNumWaitingTokens = 4 * 1024 * 1024
    seed: Seed = 0

    def keywords(self) -> dict[str, Any]:
        """Of `EngineConfig`."""
        return asdict(self)


def parallel_config(tp: str, pp: int | None, layers: str | None) -> ParallelConfig:
    """The layout that the three options ask for."""
    if tp == "auto":
        raise ConfigError(
            "tensor_parallel_size auto does not work here; give a number, "
            "or a list of them like 3,2"
        )
    return ParallelConfig.of(parse_ints(tp, "tensor_parallel_size"), pp, _layers(layers))


def num_stages(pp: int | None, points: list[str], default: int) -> int:
    """Of a vision model; `points` are the blocks at which `--split` cuts."""
    if not points:
        return default if pp is None else pp
    if not all(points):
        raise ConfigError(
            f"--split {','.join(points)!r} has an empty name; give blocks like layer3.0,layer4.0"
        )
    if pp not in (None, len(points) + 1):
        raise ConfigError(
            f"--split {','.join(points)} makes {len(points) + 1} stages, but "
            f"pipeline_parallel_size is {pp}; give one point less than stages"
        )
    return len(points) + 1


def parallel_settings(tp: str, pp: int | None, layers: str | None) -> dict[str, Any]:
    """The same as keywords of `LLM`, where the width may be `auto`."""
    return {
        "tensor_parallel_size": _widths_or_auto(tp),
        "pipeline_parallel_size": pp,
        "layers_per_stage": _layers(layers),
    }


def _widths_or_auto(text: str) -> str | tuple[int, ...]:
    if text == "auto":
        return text
    try:
        return parse_ints(text, "tensor_parallel_size")
    except ConfigError as error:
        raise ConfigError(f"{error}; auto takes the smallest width that fits") from None


def _layers(text: str | None) -> tuple[int, ...] | None:
    return None if text is None else parse_ints(text, "layers_per_stage")


def engine_config(
    *, devices: str | None = None, memory_limit: str | None = None, **settings: Any
) -> dict[str, Any]:
    """Fields of `EngineConfig` from options as they were typed; None keeps a field's default."""
    fields = settings | {
        "devices": None if devices is None else parse_ints(devices, "devices", least=0),
        "memory_limit_bytes": None if memory_limit is None else parse_bytes(memory_limit),
    }
    return {name: value for name, value in fields.items() if value is not None}


Keys = Collection[str]


def is_certificate(keys: Keys) -> bool:
    """True for the keys of what `bireme verify` writes."""
    return {"model", "layout", "is_same"} <= set(keys)


def is_trace(keys: Keys) -> bool:
    """True for the keys of what `bireme generate --trace` writes."""
    return {"traceEvents", "displayTimeUnit", "otherData"} >= set(keys) >= {"traceEvents"}


def check_writable(path: Path, what: str, is_ours: Callable[[Keys], bool]) -> None:
    """RequestError unless a file can be made at `path`: to be told before the work, not after.

    What is there already must be empty, or have keys of which `is_ours` says that we wrote them.
    """
    if path.is_dir():
        raise RequestError(f"{path} cannot be written: it is a folder; name a file in it")
    check_folder(path, path.absolute().parent)
    if path.exists() and not path.is_file():
        raise RequestError(f"{path} cannot be written: it is no regular file; name another")
    if path.exists() and path.stat().st_size and not is_ours(_keys(path)):
        raise RequestError(f"{path} is there and is no {what}; name another file, or remove it")


def check_folder(path: Path, folder: Path) -> None:
    """RequestError unless files can be made in `folder`, where `path` is to be."""
    if not folder.is_dir():
        raise RequestError(f"{path} cannot be written: {folder} is no folder")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror}") from None


def _keys(path: Path) -> Keys:
    """Those of the JSON object in `path`; none if it holds something else."""
    try:
        value = msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return ()
    return value.keys()


def check_at_least(name: str, value: int, least: int) -> None:
    """RequestError names both."""
    if value < least:
        raise RequestError(f"{name}={value} must be at least {least}")


def is_url(given: str) -> bool:
    return given.lower().startswith(("http://", "https://"))


def check_seconds(seconds: float) -> None:
    if not 0 < seconds <= MOST_SECONDS:
        raise RequestError(f"seconds={seconds:g} must be above 0 and at most {MOST_SECONDS}")


def check_no_address(given: str) -> None:
    """RequestError for what looks like a server's address, and is neither a URL nor there."""
    if _ADDRESS.fullmatch(given) and not Path(given).exists():
        raise RequestError(f"{given!r} is no model or file; did you mean http://{given}")
