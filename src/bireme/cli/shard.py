"""Write a checkpoint (or another artifact) as a sharded artifact: one file a rank, verified by chunk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bireme.cli import options, progress
from bireme.config import format_bytes

NAME = "shard"
SHORT = "Write a sharded checkpoint, a file a rank."


def run(
    model: options.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new or empty folder.")],
    tp: options.TensorParallel = "1",
    pp: options.PipelineParallel = None,
    layers_per_stage: options.LayersPerStage = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    parallel = options.parallel_config(tp, pp, layers_per_stage)
    from bireme.checkpoint.prepared import shard_model

    with progress.bytes_bar("sharding", quiet=quiet) as advance:
        manifest = shard_model(model, out, parallel, advance)
    stored = sum(file.num_bytes for file in manifest.files)
    typer.echo(f"{out}: {parallel.world_size} ranks at {parallel}, {format_bytes(stored)}")
