"""What a run is: the machine, the model, the layout and the settings, as `run.json` tells them."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence

import torch

from bireme.bench.clocks import without_peer_access
from bireme.bench.workload import Workload
from bireme.config import ParallelConfig
from bireme.engine.executor import WorkerPlan
from bireme.engine.host import EngineHost
from bireme.engine.joining import threads_per_rank
from bireme.engine.setup import environment, num_cores
from bireme.models.registry import model_layout
from bireme.observe.run_records import (
    RequestWorkload,
    RunHardware,
    RunLayout,
    RunModel,
    RunRank,
    RunSettings,
)
from bireme.parallel.layout import ModelLayout
from bireme.planning.probe import hardware
from bireme.planning.probe.driver import carrier


def layout_of(plan: WorkerPlan) -> ModelLayout:
    """As the ranks were told."""
    widths = plan.config.parallel.widths
    parallel = ParallelConfig(widths=widths, layers_per_stage=plan.layers_per_stage)
    return model_layout(plan.model, parallel)


def run_hardware(devices: Sequence[str], load_average: float) -> RunHardware:
    cpu = hardware.cpu_model()
    found = {
        device: cpu if device == "cpu" else torch.cuda.get_device_name(device) for device in devices
    }
    return RunHardware(
        host=platform.node() or "localhost",
        cpu=cpu,
        num_cores=num_cores(),
        memory_bytes=hardware.memory_bytes(),
        load_average=load_average,
        devices=found,
        without_peer_access=without_peer_access(devices),
    )


def run_model(host: EngineHost, layout: ModelLayout) -> RunModel:
    plan = host.plan
    return RunModel(
        name=host.model.name,
        folder=str(plan.folder.absolute()) if plan.folder else None,
        dtype=plan.dtype,
        num_parameters=sum(math.prod(source.shape) for source in layout.sources.values()),
        config=plan.model,
    )


def run_layout(plan: WorkerPlan, layout: ModelLayout) -> RunLayout:
    ranks = zip(layout.ranks, plan.rank_names, plan.devices, strict=True)
    return RunLayout(
        widths=layout.widths,
        layers_per_stage=plan.layers_per_stage,
        ranks=[
            RunRank(
                rank=rank.rank,
                name=name,
                stage=rank.stage,
                tp_rank=rank.tp_rank,
                device=device,
                layers=rank.layers,
            )
            for rank, name, device in ranks
        ],
    )


def run_workload(workload: Workload, num_warmup: int) -> RequestWorkload:
    return RequestWorkload(
        batch=workload.num_prompts,
        input_len=workload.input_len,
        output_len=workload.output_len,
        range_ratio=workload.range_ratio,
        seed=workload.seed,
        num_warmup=num_warmup,
    )


def run_settings(plan: WorkerPlan) -> RunSettings:
    return RunSettings(
        num_threads=threads_per_rank(len(plan.devices)),
        transport=carrier(plan.devices, plan.config.transport),
        environment=environment(),
        max_model_len=plan.max_model_len,
        num_cache_tokens=plan.budget.num_tokens,
        engine=plan.config,
    )
