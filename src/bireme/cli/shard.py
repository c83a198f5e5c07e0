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
    from bireme.checkpoint.opener import match_source, open_for_sharding
    from bireme.checkpoint.prepared import prepare_model
    from bireme.checkpoint.sharder import plan_shards, shard
    from bireme.models.registry import family_of, model_layout

    prepared = prepare_model(model, reads_bin=True)
    layout = model_layout(prepared.config, parallel)
    layout.check()
    source = open_for_sharding(prepared.folder)
    names = match_source(
        source, layout.sources, family_of(prepared.config), prepared.config.tie_word_embeddings
    )
    total = plan_shards(layout, names, dict(source.tensors)).num_bytes
    with progress.bytes_bar("sharding", total, quiet=quiet) as advance:
        manifest = shard(source, out, layout, names, advance)
    stored = sum(file.num_bytes for file in manifest.files)
    typer.echo(f"{out}: {len(layout.ranks)} ranks at {parallel}, {format_bytes(stored)}")
