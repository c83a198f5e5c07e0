"""Write what `bireme profile` or `bireme pipeline -o` kept as one HTML file, which opens offline;
of up to four runs, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bireme.cli import options
from bireme.errors import RequestError

NAME = "report"
SHORT = "Write runs as one HTML file."
_MOST_RUNS = 4


def run(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Of bireme profile, or bireme pipeline -o; up to four."
        ),
    ],
    *,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE", help="The file to write, or to write anew."),
    ] = Path("report.html"),
) -> None:
    from bireme.observe.run_folder import RunFolder
    from bireme.report.document import is_report, report

    if len(runs) > _MOST_RUNS:
        raise RequestError(f"{len(runs)} runs are too many side by side; give at most {_MOST_RUNS}")
    found = [RunFolder(folder) for folder in runs]
    if out.is_dir():
        raise RequestError(f"{out} cannot be written: it is a folder; name a file in it")
    options.check_folder(out, out.absolute().parent)
    if out.exists() and not is_report(out):
        raise RequestError(f"{out} is there and is no report; name another file, or remove it")
    out.write_text(report(found), encoding="utf-8")
    typer.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB; open it in a browser")
