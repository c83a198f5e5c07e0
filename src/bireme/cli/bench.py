"""Measure speed: `throughput` of many requests at once and `latency` of one batch, both in this process;
`serve` puts load on a server."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bireme.cli import bench_serve, options
from bireme.cli.grouped import flattened
from bireme.cli.ledger import show_run
from bireme.cli.progress import count_bar
from bireme.cli.ranks import print_ranks
from bireme.config import format_bytes

if TYPE_CHECKING:
    from bireme.bench.latency import LatencyResult
    from bireme.bench.throughput import ThroughputResult
    from bireme.engine.llm import LLM

NAME = "bench"
SHORT = "Measure throughput, latency, or a server."

app = typer.Typer(help=__doc__, no_args_is_help=True)
app.command(bench_serve.NAME, help=bench_serve.__doc__, short_help=bench_serve.SHORT)(
    bench_serve.run
)

InputLen = Annotated[int, typer.Option("--input-len", metavar="N", help="Tokens of each prompt.")]
OutputLen = Annotated[
    int, typer.Option("--output-len", metavar="N", help="Tokens that each prompt is continued by.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of the made-up prompts.")]


@app.command("throughput", help=(
    "Requests and tokens a second, all requests being there from the start. Prompts are made-up ids, "
    "answers exactly as long as asked for."
))  # fmt: skip
@flattened
def throughput(
    model: options.Model,
    *,
    num_prompts: Annotated[
        int, typer.Option("--num-prompts", metavar="N", help="Requests in all.")
    ] = 64,
    input_len: InputLen = 128,
    output_len: OutputLen = 32,
    range_ratio: Annotated[
        float,
        typer.Option("--range-ratio", metavar="R", help="Lengths vary by this share either way."),
    ] = 0.0,
    seed: Seed = 0,
    engine: options.EngineOptions,
    as_json: options.JsonOutput = False,
    ledger: options.ShowLedger = False,
) -> None:
    from bireme.bench.throughput import measure_throughput
    from bireme.bench.workload import Workload

    workload = Workload(
        num_prompts=num_prompts, input_len=input_len, output_len=output_len,
        range_ratio=range_ratio, seed=seed,
    )  # fmt: skip
    llm = _llm(model, engine)
    with llm:
        print_ranks(llm)
        with count_bar("requests", num_prompts, "tokens/s") as advance:
            result = measure_throughput(llm, workload, progress=advance)
        if ledger:
            show_run(llm)
    _print(llm, result.as_json(), _throughput_rows(result), as_json)


@app.command("latency", help=(
    "How long one batch of requests takes that begins and ends together: to the first tokens, from "
    "token to token, and in all."
))  # fmt: skip
@flattened
def latency(
    model: options.Model,
    *,
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", help="Requests at once.")
    ] = 8,
    input_len: InputLen = 32,
    output_len: OutputLen = 128,
    num_iters_warmup: Annotated[
        int, typer.Option("--num-iters-warmup", metavar="N", help="Iterations that do not count.")
    ] = 2,
    num_iters: Annotated[
        int, typer.Option("--num-iters", metavar="N", help="Iterations that count.")
    ] = 8,
    seed: Seed = 0,
    engine: options.EngineOptions,
    as_json: options.JsonOutput = False,
) -> None:
    from bireme.bench.latency import measure_latency
    from bireme.bench.workload import Workload

    options.check_at_least("batch_size", batch_size, 1)
    workload = Workload(
        num_prompts=batch_size, input_len=input_len, output_len=output_len, seed=seed
    )
    options.check_at_least("num_iters_warmup", num_iters_warmup, 0)
    options.check_at_least("num_iters", num_iters, 1)
    llm = _llm(model, engine)
    with llm:
        print_ranks(llm)
        with count_bar("iterations", num_iters_warmup + num_iters) as advance:
            result = measure_latency(
                llm,
                workload,
                num_warmup=num_iters_warmup,
                num_iterations=num_iters,
                done=lambda: advance(1, 0),
            )
    _print(llm, result.as_json(), _latency_rows(result), as_json)


def _llm(model: str, engine: options.EngineOptions) -> LLM:
    from bireme.engine.llm import LLM

    return LLM(model, **engine.keywords())


def _print(llm: LLM, result: dict[str, Any], rows: list[tuple[str, str]], as_json: bool) -> None:
    if as_json:
        about = {
            "model": llm.model.name,
            "layout": str(llm.config.parallel),
            "dtype": llm.plan.dtype,
        }
        print(json.dumps({**about, **result}, indent=1))
        return
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}", file=sys.stdout)


def _throughput_rows(result: ThroughputResult) -> list[tuple[str, str]]:
    rates = (
        f"{result.requests_per_s:.2f} requests/s, {result.total_tokens_per_s:.0f} tokens/s in all, "
        f"{result.output_tokens_per_s:.0f} tokens/s of output"
    )
    return [
        ("requests", f"{result.workload.num_prompts}, in {result.elapsed_s:.2f} s"),
        ("tokens in, out", f"{result.num_input_tokens}, {result.num_output_tokens}"),
        ("rates", rates),
        ("preemptions", f"{result.num_preemptions}"),
    ]


def _latency_rows(result: LatencyResult) -> list[tuple[str, str]]:
    def told(figures: dict[str, float]) -> str:
        return ", ".join(f"{name} {value * 1000:.1f} ms" for name, value in figures.items())

    steps, reads = [], []
    if result.step_s:
        rate = f"{format_bytes(result.weight_bytes_per_s)}/s"
        steps = [("from token to token", f"median {result.step_s * 1000:.2f} ms")]
        reads = [("weights read", f"{rate} ({format_bytes(result.weight_bytes)} a step)")]
    return [
        ("in all", told(result.percentiles(lambda it: it.total_s))),
        ("to the first tokens", told(result.percentiles(lambda it: it.first_s))),
        *steps,
        ("rate", f"{result.output_tokens_per_s:.1f} tokens/s of output"),
        *reads,
    ]
