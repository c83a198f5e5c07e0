"""From a model and a configuration to a plan, before any rank is told anything.

Everything that can be refused is refused here: an unsupported architecture, a layout that cannot
be, a missing tensor, more ranks than devices, a model larger than the devices.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bireme.checkpoint.artifact import Artifact
from bireme.checkpoint.names import NameMap
from bireme.checkpoint.opener import match_source, open_folder
from bireme.checkpoint.prepared import PreparedModel
from bireme.config import DTYPE_BYTES, EngineConfig, ParallelConfig, format_bytes
from bireme.engine.budget import (
    CacheBudget,
    cache_budget,
    least_bytes,
    memory_of,
    resolve_max_model_len,
    step_limits,
)
from bireme.engine.chunks import CPU_CHUNKS, gpu_chunks
from bireme.engine.executor import WorkerPlan
from bireme.engine.input_processor import ServedModel
from bireme.engine.limits import SchedulerLimits
from bireme.errors import CapacityError, ConfigError
from bireme.kernels.query_tiles import TILE, TILES_AT_ONCE
from bireme.model_config import ModelConfig
from bireme.models.registry import model_layout, rank_layouts
from bireme.models.rope import depends_on_length
from bireme.parallel.layout import ModelLayout
from bireme.parallel.memory import rank_memory


def resolve_dtype(config: ModelConfig, engine: EngineConfig) -> str:
    dtype = config.dtype if engine.dtype == "auto" else engine.dtype
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"dtype {dtype} is not supported; supported are {', '.join(DTYPE_BYTES)}")
    return dtype


def resolve_devices(engine: EngineConfig) -> tuple[str, ...]:
    """One device a rank; ConfigError for CUDA where there is none, CapacityError for more ranks than
    GPUs."""
    world = engine.parallel.world_size
    if engine.device == "cpu":
        if engine.devices is not None:
            raise ConfigError("devices maps ranks to GPUs; it goes with device cuda, not with cpu")
        return ("cpu",) * world
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        if engine.device == "cuda" or engine.devices is not None:
            raise ConfigError(
                "device cuda was asked for, and torch sees no CUDA device; use device cpu"
            )
        return ("cpu",) * world
    chosen = engine.devices or tuple(range(world))
    num_needed = len(set(chosen)) if _may_share_gpus() else world
    if max(chosen) >= count or len(set(chosen)) < num_needed:
        raise CapacityError(
            f"{world} ranks on devices {','.join(map(str, chosen))} need as many GPUs; "
            f"{count} are here, numbered from 0; use fewer ranks or device cpu"
        )
    return tuple(f"cuda:{index}" for index in chosen)


def _may_share_gpus() -> bool:
    """NCCL's own switch (2.30 and later): several ranks on one GPU, to try a layout out."""
    return os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"


_CGROUPS = Path("/sys/fs/cgroup")
MAX_RANKS = 64  # of the search for a layout that fits


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes that tensors may take: those of one rank, or, if shared, of all ranks together."""

    num_bytes: int
    is_shared: bool = False

    def of_rank(self, num_ranks: int) -> int:
        return self.num_bytes // num_ranks if self.is_shared else self.num_bytes


def device_memory(engine: EngineConfig, devices: tuple[str, ...]) -> DeviceMemory:
    """The limit that was set, or what the devices have; CPU ranks share their host's memory."""
    if engine.memory_limit_bytes is not None:
        return DeviceMemory(engine.memory_limit_bytes)
    if devices[0] == "cpu":
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        available = min([_available_bytes() or free, *_cgroup_bytes()])
        return DeviceMemory(int(available * engine.gpu_memory_utilization), is_shared=True)
    import torch

    shares = [
        torch.cuda.mem_get_info(int(device.partition(":")[2]))[0] // num_ranks
        for device, num_ranks in Counter(devices).items()
    ]
    return DeviceMemory(int(min(shares) * engine.gpu_memory_utilization))


def _available_bytes() -> int | None:
    """MemAvailable: free memory and what the page cache can give back."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _cgroup_bytes() -> list[int]:
    """What each memory limit above this process leaves, its page cache counted as free."""
    found = []
    try:
        own = Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip().lstrip("/")
        for folder in (_CGROUPS / own, *(_CGROUPS / own).parents):
            if folder.is_relative_to(_CGROUPS) and (folder / "memory.max").exists():
                most = (folder / "memory.max").read_text().strip()
                used = int((folder / "memory.current").read_text())
                stat = (folder / "memory.stat").read_text().split()
                cache = int(stat[stat.index("file") + 1])
                found += [max(0, int(most) - used + cache)] if most != "max" else []
    except (OSError, ValueError):
        return found
    return found


def smallest_fit(
    config: ModelConfig, engine: EngineConfig, memory: DeviceMemory, max_ranks: int = MAX_RANKS
) -> ParallelConfig | None:
    """The layout of fewest ranks that fits; the squarest of equals."""
    dtype = resolve_dtype(config, engine)
    fewest = -(-_weight_bytes(config, dtype) // max(1, memory.num_bytes))
    if memory.is_shared and fewest > 1:
        return None
    for world in range(max(1, fewest), max_ranks + 1):
        shapes = [(tp, world // tp) for tp in range(1, world + 1) if world % tp == 0]
        shapes = [
            (tp, pp) for tp, pp in shapes if tp <= config.num_heads and pp <= config.num_layers
        ]
        for tp, pp in sorted(shapes, key=max):
            parallel = ParallelConfig.of(tp, pp)
            if _fits(config, engine, parallel, dtype, memory.of_rank(world)):
                return parallel
    return None


def _weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Of the whole model: no layout holds less in sum."""
    (whole,) = rank_layouts(config, ParallelConfig())
    return whole.num_elements * DTYPE_BYTES[dtype]


def _fits(
    config: ModelConfig, engine: EngineConfig, parallel: ParallelConfig, dtype: str, limit: int
) -> bool:
    """True if every rank fits; ranks behind the first that does not are never laid out."""
    limits = step_limits(config, engine)
    return all(
        least_bytes(
            config,
            engine,
            rank_memory(config, parallel.widths, rank, DTYPE_BYTES[dtype], limits),
        )
        <= limit
        for rank in rank_layouts(config, parallel)
    )


def resolve_auto_width(model: PreparedModel, engine: EngineConfig) -> EngineConfig:
    """`-tp auto`: the smallest width that fits the devices, at the given number of stages."""
    devices = resolve_devices(dataclasses.replace(engine, parallel=ParallelConfig(), devices=None))
    memory = device_memory(engine, devices)
    dtype, stages = resolve_dtype(model.config, engine), engine.parallel.pp_size
    for width in range(1, model.config.num_heads + 1):
        parallel = ParallelConfig.of(width, stages, engine.parallel.layers_per_stage)
        limit = memory.of_rank(parallel.world_size)
        if _fits(model.config, engine, parallel, dtype, limit):
            return dataclasses.replace(engine, parallel=parallel)
    raise CapacityError(
        f"{model.name} does not fit {_told(memory)} at any width up to its "
        f"{model.config.num_heads} heads with {stages} stages; "
        f"{_remedy(model.config, engine, memory, dtype)}"
    )


def make_plan(model: PreparedModel, engine: EngineConfig) -> WorkerPlan:
    """Everything that the ranks must be told. Raises UserError for what cannot work."""
    config = model.config
    layout = model_layout(config, engine.parallel)
    layout.check()
    dtype, max_len = resolve_dtype(config, engine), resolve_max_model_len(config, engine)
    if engine.load_format == "dummy":
        folder, names = None, NameMap("", "", ())
    else:
        folder, names = model.folder, _match(model, layout)
    devices = resolve_devices(engine)
    budget = _budget(model, layout, engine, dtype, devices)
    bounds = {rank.stage: rank.layers for rank in layout.ranks}
    return WorkerPlan(
        model=config,
        config=engine,
        layers_per_stage=tuple(stop - start for start, stop in bounds.values()),
        folder=folder,
        names=names,
        budget=budget,
        max_model_len=max_len,
        dtype=dtype,
        devices=devices,
    )


def _match(model: PreparedModel, layout: ModelLayout) -> NameMap:
    source = open_folder(model.folder)
    names = match_source(source, layout, model.config)
    if isinstance(source, Artifact):
        source.check_files()
    return names


def _told(memory: DeviceMemory) -> str:
    size = format_bytes(memory.num_bytes)
    return f"the {size} of this machine" if memory.is_shared else f"{size} a rank"


def _remedy(config: ModelConfig, engine: EngineConfig, memory: DeviceMemory, dtype: str) -> str:
    """What would fit, or what to change where nothing does."""
    if fit := smallest_fit(config, engine, memory):
        return f"smallest fit {fit}"
    weights = _weight_bytes(config, dtype)
    most = memory.num_bytes if memory.is_shared else MAX_RANKS * memory.num_bytes
    if weights <= most:
        return (
            f"no layout of up to {MAX_RANKS} ranks fits {_told(memory)}; lower max_model_len, "
            "max_num_seqs or max_num_batched_tokens"
        )
    holds = _told(memory) if memory.is_shared else f"what {MAX_RANKS} ranks hold"
    return f"its weights alone are {format_bytes(weights)}, more than {holds}; use larger devices"


def _budget(
    model: PreparedModel,
    layout: ModelLayout,
    engine: EngineConfig,
    dtype: str,
    devices: tuple[str, ...],
) -> CacheBudget:
    """CapacityError, with what would fit, where a rank cannot hold one request."""
    memory = device_memory(engine, devices)
    limit = memory.of_rank(engine.parallel.world_size)
    ranks = memory_of(model.config, layout, engine, dtype)
    needed = max(least_bytes(model.config, engine, rank) for rank in ranks)
    if needed > limit:
        remedy = _remedy(model.config, engine, memory, dtype)
        raise CapacityError(
            f"{model.name} at {engine.parallel} needs {format_bytes(needed)} a rank, "
            f"has {format_bytes(limit)}; {remedy}"
        )
    return cache_budget(model.config, engine, ranks, limit)


def scheduler_limits(plan: WorkerPlan) -> SchedulerLimits:
    config, engine = plan.model, plan.config
    is_on_gpus = any(device != "cpu" for device in plan.devices)
    num_heads = -(-config.num_heads // min(engine.parallel.widths))  # of the largest cut
    return SchedulerLimits(
        pp_size=engine.parallel.pp_size,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        block_size=engine.block_size,
        max_num_waiting=engine.max_num_waiting,
        has_prefix_caching=engine.enable_prefix_caching,
        context_per_token=_context_per_token(config),
        depends_on_length=config.rope is not None and depends_on_length(config.rope),
        chunks=gpu_chunks(num_heads, TILE, TILES_AT_ONCE) if is_on_gpus else CPU_CHUNKS,
    )


def _context_per_token(config: ModelConfig) -> float:
    """Context tokens whose scores and values take as many multiplications as a token's matrices.

    2 * num_heads * head_dim of them a place and layer; as many as there are weights in a layer."""
    per_layer = 2 * config.num_heads * config.head_dim
    attention = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim * config.hidden_size
    moe, width = config.moe, config.intermediate_size
    if moe is not None:
        width = moe.intermediate_size * moe.num_experts_per_tok
    return (attention + 3 * width * config.hidden_size) / per_layer


def served_model(model: PreparedModel, plan: WorkerPlan) -> ServedModel:
    return ServedModel(
        model.name, model.folder, plan.model.vocab_size, plan.max_model_len, model.eos_token_ids
    )
