"""Turn a sharded artifact back into the checkpoint that it was made from, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bireme.cli import progress

NAME = "export"
SHORT = "Turn a sharded checkpoint back into its source."


def run(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="A folder that `bireme shard` wrote.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new or empty folder.")],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    from bireme.checkpoint.artifact import Artifact
    from bireme.checkpoint.exporter import export

    source = Artifact(artifact)
    total = source.manifest.num_source_bytes
    with progress.bytes_bar("exporting", total, quiet=quiet) as advance:
        export(source, out, advance)
    typer.echo(f"{out}: {len(source.manifest.sources) + len(source.manifest.carried)} files")
