"""Show where each rank's time went: of a trace (--trace of another command), of the run folder of `bireme
profile` or `bireme pipeline -o`, or of a running server.

Every instant of a rank is in one row. docs/metrics.md says what each is, and why a rank idles.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated

import typer

from bireme.cli import options
from bireme.errors import RequestError

if TYPE_CHECKING:
    from rich.console import Console

    from bireme.engine.host import EngineHost
    from bireme.observe.told import ToldLedger, ToldRank

NAME = "ledger"
SHORT = "Show where each rank's time went, bubbles by cause."
_MOST_COLUMNS = 8
LABEL_WIDTH = len("rank 999 ")


def run(
    source: Annotated[
        str,
        typer.Argument(metavar="TRACE.json|RUN|URL", help="A trace, a run folder, or a server."),
    ],
    *,
    seconds: options.PastSeconds = 5.0,
    api_key: options.ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    from rich.console import Console

    from bireme.observe.run_folder import RunFolder
    from bireme.observe.told import told_of_trace

    num_columns = max(20, Console().width - LABEL_WIDTH)
    options.check_seconds(seconds)
    if options.is_url(source):
        told = _of_server(source, seconds, api_key, num_columns)
    else:
        options.check_no_address(source)
        path = Path(source)
        told = told_of_trace(RunFolder(path).trace if path.is_dir() else path, num_columns)
    if as_json:
        typer.echo(told.as_json().decode())
    else:
        show(told)


def _of_server(url: str, seconds: float, api_key: str | None, num_columns: int) -> ToldLedger:
    """RequestError where it does not answer."""
    import asyncio

    import msgspec

    from bireme.bench.client import fetch
    from bireme.observe.told import ToldLedger

    path = f"/debug/ledger?seconds={seconds:g}&columns={num_columns}"
    (body,) = asyncio.run(fetch(url, api_key, path))
    try:
        return msgspec.json.decode(body, type=ToldLedger)
    except msgspec.DecodeError as error:
        raise RequestError(f"{url} gives no ledger: {error}") from None


def show_run(host: EngineHost) -> None:
    """Of all that an engine in this process did, as far back as its rings reach."""
    from rich.console import Console

    from bireme.observe.ledger import make_ledger
    from bireme.observe.told import ToldLedger

    console = Console(stderr=True, highlight=False)
    num_columns = max(20, console.width - LABEL_WIDTH)
    show(ToldLedger.of(make_ledger(host.recorded()), num_columns=num_columns), console)


def show(told: ToldLedger, console: Console | None = None) -> None:
    """As a table, of stages where there are many ranks, and as a grid."""
    from rich.console import Console
    from rich.table import Table

    from bireme.observe.causes import Row
    from bireme.observe.grid import LEGEND

    console = console or Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column(f"% of {told.seconds:.3g} s")
    columns = _columns(told.ranks)
    for name in columns:
        table.add_column(name, justify="right")
    for row in Row:
        shares = [mean(rank.shares[row] for rank in ranks) for ranks in columns.values()]
        if any(shares):
            table.add_row(row.replace("_", " "), *(f"{100 * share:.1f}" for share in shares))
    console.print(table)
    for rank in told.ranks:
        if rank.late:
            name, share = max(rank.late.items(), key=lambda item: item[1])
            console.print(f"{rank.name} waited {100 * share:.1f} % of the time for {name}")
        if rank.overlapped:
            share = rank.overlapped
            console.print(f"{rank.name} sent beside its work for {100 * share:.1f} % of the time")
    if any(rank.is_sampled for rank in told.ranks):
        console.print(
            "collectives are sampled: all steps are taken to be as those that were marked"
        )
    console.print()
    width = max(len(_short(rank)) for rank in told.ranks)
    for rank in told.ranks:
        console.print(f"{_short(rank):{width}} {rank.line}", overflow="crop", no_wrap=True)
    console.print(LEGEND, style="dim")


def _columns(ranks: Sequence[ToldRank]) -> dict[str, list[ToldRank]]:
    if len(ranks) <= _MOST_COLUMNS:
        return {f"{_short(rank)}\nstage {rank.stage}": [rank] for rank in ranks}
    found: dict[str, list[ToldRank]] = {}
    for rank in ranks:
        found.setdefault(f"stage {rank.stage}", []).append(rank)
    return {f"{name}\n{len(them)} ranks": them for name, them in found.items()}


def _short(rank: ToldRank) -> str:
    return rank.name.partition(" (")[0]
