"""Run a workload, and keep all that was measured of it: a folder for `bireme doctor`.

Prompts are made-up ids, answers exactly as long as asked for. A run with other prompts warms up first.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bireme.cli import options
from bireme.cli.grouped import flattened
from bireme.cli.progress import count_bar
from bireme.cli.ranks import print_ranks

if TYPE_CHECKING:
    from bireme.observe.run_folder import Run

NAME = "profile"
SHORT = "Run a workload, and keep what was measured."
_NUM_SIZES = 6  # of collectives, that are shown


@flattened
def run(
    model: options.Model,
    *,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Requests at once.")] = 8,
    input_len: Annotated[
        int, typer.Option("--input-len", metavar="N", help="Tokens of each prompt.")
    ] = 128,
    output_len: Annotated[
        int, typer.Option("--output-len", metavar="N", help="Tokens of each answer.")
    ] = 128,
    seed: Annotated[int, typer.Option("--seed", help="Of the made-up prompts.")] = 0,
    engine: options.EngineOptions,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="RUN", help="The folder, new or of an earlier run."),
    ] = Path("run"),
    as_json: options.JsonOutput = False,
) -> None:
    from bireme.bench.profiling import profile
    from bireme.bench.workload import Workload
    from bireme.engine.llm import LLM
    from bireme.observe.run_folder import RUN_NAME, check_run_folder

    workload = Workload(num_prompts=batch, input_len=input_len, output_len=output_len, seed=seed)
    check_run_folder(out)
    with LLM(model, **engine.keywords()) as llm:
        print_ranks(llm)
        with count_bar("requests", batch, "tokens/s") as advance:
            made = profile(llm, workload, out, done=advance)
    if as_json:
        typer.echo((out / RUN_NAME).read_text())
    else:
        _print(made)
        typer.echo(f"kept in {out}: bireme doctor {out}, bireme ledger {out}/trace.json")


def _print(made: Run) -> None:
    from bireme.cli.ledger import show
    from bireme.cli.tables import console, table
    from bireme.config import format_bytes

    result, latency = made.result, made.latency_s
    typer.echo(
        f"{result['num_requests']} requests in {result['elapsed_time']:.2f} s, "
        f"{result['output_tokens_per_second']:.0f} tokens/s of output; to the first token "
        f"p50 {1e3 * latency['ttft']['p50']:.1f} ms, between tokens p50 {1e3 * latency['itl']['p50']:.2f} ms"
    )
    show(made.ledger)
    if made.collectives:
        rows = table("collective", "bytes", "times", "wait", "move", "of one", "rate", "skew")
        for it in made.collectives[:_NUM_SIZES]:
            rows.add_row(
                it.kind.replace("_", "-"), format_bytes(it.num_bytes), str(it.count),
                f"{it.wait_s:.2f} s", f"{it.move_s:.2f} s", f"{1e6 * it.median_move_s:.0f} us",
                f"{format_bytes(it.bytes_per_s)}/s", f"{1e6 * it.skew_s:.0f} us",
            )  # fmt: skip
        console().print(rows)
