"""Continue prompts (or answer them with --chat), streaming, on one process a rank.

Of several prompts, each is printed whole when it ends.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bireme.cli import options
from bireme.cli.prompts import read_prompts
from bireme.cli.ranks import print_ranks
from bireme.sampling_params import SamplingParams

if TYPE_CHECKING:
    from bireme.engine.host import Prompt
    from bireme.engine.llm import LLM
    from bireme.outputs import Delta, RequestOutput

NAME = "generate"
SHORT = "Continue or answer prompts, streaming."
_DEFAULT_MAX_TOKENS = 128


def run(
    model: options.Model,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Texts to continue.")
    ] = None,
    tp: options.TensorParallelOrAuto = "1",
    pp: options.PipelineParallel = None,
    layers_per_stage: options.LayersPerStage = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts-file",
            metavar="X.jsonl",
            help='A line a prompt: {"prompt": ...} or {"prompt_token_ids": [...]}.',
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put each prompt through the model's chat template.")
    ] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            metavar="N",
            help="Tokens to add at most. Models whose rope scaling depends on length (dynamic, longrope) "
            f"may say something else with another N. [default: {_DEFAULT_MAX_TOKENS}, or what the context leaves]",
        ),
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0,
    top_k: Annotated[
        int, typer.Option("--top-k", help="Draw from the k likeliest tokens; 0: from all.")
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option("--top-p", help="Draw from the likeliest tokens of this total probability."),
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Makes sampling repeatable, at any layout.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end-of-text token.")
    ] = False,
    dtype: options.DTypeOption = "auto",
    device: options.Device = "auto",
    devices: options.Devices = None,
    memory_limit: options.MemoryLimit = None,
    load_format: options.LoadFormat = "auto",
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = None,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    deterministic: options.Deterministic = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON line a prompt.")] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace", metavar="OUT.json", help="Write a Chrome/Perfetto trace, a track a rank."
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing but the answer.")
    ] = False,
) -> None:
    given = read_prompts(prompts or [], prompts_file)
    if trace is not None:
        options.check_writable(trace, "trace of ours", options.is_trace)
    config = options.engine_config(
        devices=devices, memory_limit=memory_limit, dtype=dtype, device=device,
        load_format=load_format, max_model_len=max_model_len, max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens, deterministic=deterministic,
    )  # fmt: skip
    sampling = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, ignore_eos=ignore_eos,
        max_tokens=_DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
    )  # fmt: skip
    from bireme.engine.llm import LLM

    llm = LLM(model, **options.parallel_settings(tp, pp, layers_per_stage), **config)
    ids = [_as_ids(llm, prompt, chat) for prompt in given]
    params = [
        sampling if max_tokens is not None else _fitting(sampling, llm, prompt) for prompt in ids
    ]
    deltas = llm.stream(ids, params)  # refuses a bad prompt before any process starts
    with llm:
        if not quiet and not as_json:
            print_ranks(llm)
        try:
            if as_json:
                _print_json(deltas)
            else:
                _print_text(deltas, len(given), has_text=llm.has_tokenizer, quiet=quiet)
        finally:
            if trace is not None:  # of a rank that failed, too
                llm.write_trace(trace)


def _as_ids(llm: LLM, prompt: Prompt, chat: bool) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    if chat:
        return llm.chat_ids([{"role": "user", "content": prompt}])
    return llm.tokenizer.encode(prompt)


def _fitting(sampling: SamplingParams, llm: LLM, ids: list[int]) -> SamplingParams:
    """Without --max-tokens: what the context leaves, up to the default."""
    room = llm.plan.max_model_len - len(ids)
    return dataclasses.replace(sampling, max_tokens=max(1, min(_DEFAULT_MAX_TOKENS, room)))


def _print_text(deltas: Iterator[Delta], num_prompts: int, *, has_text: bool, quiet: bool) -> None:
    """One prompt streams; several are printed whole, each when it ends. Without a tokenizer: ids."""
    for delta in deltas:
        new = delta.text if has_text else "".join(f"{id_} " for id_ in delta.token_ids)
        if num_prompts == 1:
            print(new, end="", flush=True)
        if delta.output is None:
            continue
        if num_prompts == 1:
            print(flush=True)
        else:
            done = delta.output.outputs[0]
            text = done.text if has_text else " ".join(map(str, done.token_ids))
            print(f"--- prompt {delta.index}\n{text}", flush=True)
        if not quiet:
            _print_metrics(delta.output)


def _print_json(deltas: Iterator[Delta]) -> None:
    for delta in deltas:
        if delta.output is not None:
            print(json.dumps(_as_json(delta.index, delta.output)), flush=True)


def _print_metrics(output: RequestOutput) -> None:
    metrics = output.metrics
    assert metrics is not None
    print(
        f"  {metrics.num_tokens} tokens, {output.outputs[0].finish_reason}; first after "
        f"{metrics.ttft_s * 1000:.0f} ms, {metrics.tokens_per_s:.1f} tokens/s",
        file=sys.stderr,
    )


def _as_json(index: int, output: RequestOutput) -> dict[str, Any]:
    completion, metrics = output.outputs[0], output.metrics
    assert metrics is not None
    return {
        "index": index,
        "prompt_token_ids": output.prompt_token_ids,
        "token_ids": completion.token_ids,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "ttft_s": round(metrics.ttft_s, 6),
        "tokens_per_s": round(metrics.tokens_per_s, 3),
    }
