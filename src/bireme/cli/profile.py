"""Run one batch of requests and write down all that can be measured of it, to a run folder: a trace,
where each rank's time went, collectives by size, time by layer, memory by kind, and achieved rates.

Prompts are made-up ids, answers exactly as long as asked for. The figures are of one pass with nothing
in its way; times by layer, memory's peak, --kernels, --batches and --chunks are of passes after it.
docs/run-folder.md says what every field is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bireme.cli import bench, options
from bireme.cli.grouped import flattened
from bireme.cli.nsys import OPTION, find_nsys, run_under_nsys
from bireme.cli.profile_report import print_profile
from bireme.cli.progress import count_bar
from bireme.cli.ranks import print_ranks
from bireme.config import parse_ints

NAME = "profile"
SHORT = "Run a workload, and write down where its time and memory went."


@flattened
def run(
    context: typer.Context,
    model: options.Model,
    *,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="RUN", help="The folder to write, or to write anew."),
    ] = Path("run"),
    batch: Annotated[
        int, typer.Option("--batch", metavar="N", help="Requests, all there from the start.")
    ] = 8,
    input_len: bench.InputLen = 128,
    output_len: bench.OutputLen = 32,
    num_warmup: Annotated[
        int, typer.Option("--num-warmup", metavar="N", help="Passes before the measured one.")
    ] = 1,
    seed: bench.Seed = 0,
    engine: options.EngineOptions,
    cluster: Annotated[
        Path | None,
        typer.Option(
            "--cluster",
            metavar="FILE",
            help="cluster.toml of `bireme probe`: what figures are held against.",
        ),
    ] = None,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Then a short pass under torch.profiler: RUN/kernels/."),
    ] = False,
    batches: Annotated[
        str | None,
        typer.Option(
            "--batches", metavar="1,2,4", help="Then a pass with as many requests at once, each."
        ),
    ] = None,
    chunks: Annotated[
        str | None,
        typer.Option(
            "--chunks",
            metavar="128,512",
            help="Then a pass with at most as many tokens a step, each.",
        ),
    ] = None,
    under_nsys: Annotated[
        bool, typer.Option(OPTION, help="Run under Nsight Systems: RUN/nsys.nsys-rep.")
    ] = False,
    as_json: options.JsonOutput = False,
) -> None:
    from bireme.bench.workload import Workload
    from bireme.cluster.file import read_cluster
    from bireme.observe.run_folder import prepare_run_folder

    options.check_at_least("batch", batch, 1)
    workload = Workload(num_prompts=batch, input_len=input_len, output_len=output_len, seed=seed)
    options.check_at_least("num_warmup", num_warmup, 0)
    sizes = _sizes(batches, "batches"), _sizes(chunks, "chunks")
    if cluster is not None:
        read_cluster(cluster)  # to be told before the work
    keywords = engine.keywords()
    arguments: list[str] = context.obj
    nsys = find_nsys(out, arguments) if under_nsys else None
    from bireme.bench.passes import ProfilePlan, check_workload
    from bireme.bench.profiling import profile
    from bireme.bench.size_passes import check_batches, check_chunks
    from bireme.engine.llm import LLM

    llm = LLM(model, **keywords)
    check_workload(llm, workload)
    check_batches(sizes[0], llm.config.max_num_seqs)
    check_chunks(sizes[1], llm.config.max_num_batched_tokens)
    prepare_run_folder(out)
    if nsys is not None:
        llm.close()
        run_under_nsys(nsys, out, arguments)
    plan = ProfilePlan(
        workload=workload,
        num_warmup=num_warmup,
        has_kernels=kernels,
        cluster=cluster,
        folder=out,
        command=["bireme", *arguments],
        batches=sizes[0],
        chunks=sizes[1],
    )
    with llm:
        print_ranks(llm)
        with count_bar("passes", plan.num_passes) as advance:
            run_folder = profile(llm, plan, lambda: advance(1, 0))
    if as_json:
        typer.echo((out / "profile.json").read_text(), nl=False)
    else:
        print_profile(run_folder)


def _sizes(text: str | None, what: str) -> tuple[int, ...]:
    """From small to large."""
    return () if text is None else tuple(sorted(set(parse_ints(text, what))))
