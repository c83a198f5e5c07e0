"""Cut a vision model into stages, run a batch of images through them in micro-batches, and measure it
beside one device: throughput, speed-up, and the bubble.

Images are on the first stage's device before the clock starts; a rate counts from the first forward's
start to the last one's end. MODEL is a folder in the format of transformers, resnet-50 or the like, torchvision:NAME,
timm:NAME or module:factory; all but folders have made-up weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bireme.cli import options
from bireme.cli.notes import note, note_if_busy
from bireme.cli.progress import count_bar
from bireme.config import EngineConfig, ParallelConfig, parse_ints
from bireme.engine.setup import num_cores
from bireme.errors import RequestError

if TYPE_CHECKING:
    import torch

    from bireme.chrome_trace import Recorded
    from bireme.vision.model import VisionModel

NAME = "pipeline"
SHORT = "Run a vision model in stages, and measure it."
_DEFAULT_BATCH = 64
_DEFAULT_COUNTS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class _Batch:
    names: list[str]  # of files; none where images are made up
    images: torch.Tensor


def run(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="What to run; or give --config.")
    ] = None,
    *,
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="NAME",
            help="resnet-18, -34, -50, -101, -152, vit-b16 or vit-l16, with made-up weights.",
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            metavar="FOLDER",
            help="Of safetensors files, for a model that is no folder; its tensors have the module's names.",
        ),
    ] = None,
    pp: Annotated[
        int | None,
        typer.Option(
            "--pipeline-parallel-size",
            "-pp",
            metavar="N",
            help="Stages, one device each. [default: 2, or as --split says]",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            metavar="layer3.0,layer4.0",
            help="The blocks that begin a stage; by measured cost if not given.",
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch",
            metavar="N",
            help=f"Images at once. [default: {_DEFAULT_BATCH}, or as many as there are in --images]",
        ),
    ] = None,
    micro_batches: Annotated[
        str | None,
        typer.Option(
            "--micro-batches",
            metavar="1,2,4",
            help="Into how many the batch is cut, to try one after another. "
            f"[default: {','.join(map(str, _DEFAULT_COUNTS))}]",
        ),
    ] = None,
    batches: Annotated[
        int,
        typer.Option(
            "--batches", metavar="N", help="That follow one another without a pause, in each run."
        ),
    ] = 1,
    images: Annotated[
        Path | None,
        typer.Option("--images", metavar="FOLDER", help="Image files; made up if not given."),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            "--image-size",
            metavar="N",
            help="Pixels on a side. [default: the checkpoint's, else 224]",
        ),
    ] = None,
    top: Annotated[
        int, typer.Option("--top", metavar="N", help="Classes to print of each image of a folder.")
    ] = 5,
    runs: Annotated[
        int, typer.Option("--runs", metavar="N", help="Of each trial, of which the median counts.")
    ] = 3,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            metavar="N",
            help="Of each CPU rank. [default: a stage's share of the cores]",
        ),
    ] = None,
    enforce_eager: Annotated[
        bool,
        typer.Option("--enforce-eager", help="On GPUs: launch each kernel, without CUDA graphs."),
    ] = False,
    dtype: options.DTypeOption = "auto",
    device: options.Device = "auto",
    devices: options.Devices = None,
    memory_limit: options.MemoryLimit = None,
    plan_only: Annotated[
        bool,
        typer.Option(
            "--plan-only", help="Measure the blocks, print them and the plan, and run nothing."
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="RUN", help="Write the best trial's median run to a run folder."
        ),
    ] = None,
    ledger: options.ShowLedger = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace", metavar="OUT.json", help="Write a Chrome/Perfetto trace, a track a rank."
        ),
    ] = None,
    as_json: options.JsonOutput = False,
) -> None:
    points = [] if split is None else split.split(",")
    num_stages = options.num_stages(pp, points, default=2)
    for name, value in (
        ("runs", runs), ("top", top), ("threads", 1 if threads is None else threads), ("batches", batches)
    ):  # fmt: skip
        options.check_at_least(name, value, 1)
    if threads is not None and threads > (cores := num_cores()):
        raise RequestError(f"threads={threads} exceeds the {cores} cores of this host")
    note_if_busy()
    settings = EngineConfig(
        parallel=ParallelConfig.of(1, num_stages),
        **options.engine_config(devices=devices, memory_limit=memory_limit, device=device),
    )
    if trace is not None:
        options.check_writable(trace, "trace of ours", options.is_trace)
    from bireme.bench.pipeline_run import Begun, PipelineRun
    from bireme.cli.pipeline_report import Report, show_ledger, write_trace
    from bireme.engine.joining import threads_per_rank
    from bireme.engine.pool import WorkerPool
    from bireme.engine.prepare import device_memory, resolve_devices
    from bireme.observe.run_folder import prepare_run_folder
    from bireme.vision.agreement import check_same
    from bireme.vision.messages import VISION
    from bireme.vision.model import find_model
    from bireme.vision.pipeline import (
        RankSettings,
        check_row,
        measure_blocks,
        micro_batch_sizes,
    )
    from bireme.vision.plan import check_num_stages, make_plan
    from bireme.vision.sweep import Sweeper, check_images_fit, one_device, work_of
    from bireme.vision.tracing import trace as traced_blocks
    from bireme.vision.weights import open_weights

    found = find_model(model, config, weights, image_size=image_size, dtype=dtype)
    where = resolve_devices(settings)
    limit_bytes = device_memory(settings, where).of_rank(num_stages)
    if images is None or batch is not None:
        check_images_fit(found, batch or _DEFAULT_BATCH, limit_bytes)
    given = _images(found, images, batch)
    counts = _counts(micro_batches, len(given.images))
    for count in counts:
        check_row(count, batches)
    timed = micro_batch_sizes(len(given.images), sorted(counts)[len(counts) // 2])[0]
    ranks = RankSettings(
        devices=where,
        num_threads=threads or threads_per_rank(num_stages),
        is_captured=not enforce_eager,
    )
    work = work_of(found, len(given.images), max(counts), ranks.ring_depth)
    module = found.build()
    open_weights(found, module)  # refuses what is missing, before any process starts
    blocks = traced_blocks(module, found.image_shape, found.torch_dtype)
    blocks.check_classifies()
    check_num_stages(num_stages, len(blocks.blocks))
    starts = [blocks.block_at(point) for point in points] if points else None
    report = Report(found, given.names, counts, batches, ranks, limit_bytes, top, timed)
    begun = Begun()
    if out is not None and not plan_only:
        prepare_run_folder(out)
    with WorkerPool(VISION) as pool:
        costs = measure_blocks(found, blocks, pool, ranks, timed)
        plan = make_plan(costs, num_stages, work, limit_bytes, starts)
        if plan_only:
            report.print_blocks(plan, as_json)
            return
        if not as_json:
            report.print_plan(plan)
        sweeper = Sweeper(
            model=found, traced=blocks, images=given.images, counts=counts,
            limit_bytes=limit_bytes, num_batches=batches, num_runs=runs, pool=pool,
        )  # fmt: skip
        with count_bar("trials", 2 * len(counts)) as advance:
            alone = sweeper.sweep(one_device(plan), ranks.alone(), lambda: advance(1, 0))

            def keep(recorded: Recorded) -> None:
                if trace is not None:
                    write_trace(trace, recorded)

            staged = sweeper.sweep(plan, ranks, lambda: advance(1, 0), keep)
    if as_json:
        report.print_json(plan, alone, staged)
    else:
        report.print_sweep(plan, alone, staged)
    if ledger:
        show_ledger(staged)
    if out is not None:
        done = PipelineRun(
            command=["bireme", *context.obj], begun=begun, model=found,
            num_parameters=sum(weight.numel() for weight in module.parameters()), images=images,
            settings=ranks, limit_bytes=limit_bytes, plan=plan, timed_micro_batch=timed,
            num_batches=batches, num_runs=runs, alone=alone, staged=staged,
        )  # fmt: skip
        note(f"{out}: written" if done.write(out) else f"{out} is not written: nothing fits")
    check_same(alone, staged, report.allowed)


def _counts(text: str | None, batch: int) -> tuple[int, ...]:
    if text is None:
        return tuple(count for count in _DEFAULT_COUNTS if count <= batch)
    counts = parse_ints(text, "micro-batches")
    if max(counts) > batch:
        raise RequestError(
            f"{batch} images cannot make {max(counts)} micro-batches; use at most {batch}, or more images"
        )
    return tuple(dict.fromkeys(counts))


def _images(model: VisionModel, folder: Path | None, batch: int | None) -> _Batch:
    from bireme.vision.preprocessing import made_up_images, read_images

    options.check_at_least("batch", _DEFAULT_BATCH if batch is None else batch, 1)
    if folder is None:
        return _Batch([], made_up_images(batch or _DEFAULT_BATCH, model.image_shape))
    preprocessing = model.preprocessing
    if preprocessing.side != model.image_size:
        raise RequestError(
            f"image_size={model.image_size} is not what {model.name} makes of images; "
            f"leave it out, or give {preprocessing.side}"
        )
    names, images = read_images(folder, preprocessing, batch)
    if batch is not None and len(names) < batch:
        raise RequestError(f"{folder} holds {len(names)} images; --batch {batch} needs as many")
    return _Batch(names, images)
