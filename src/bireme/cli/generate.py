"""Continue prompts (or answer them with --chat), streaming, on one process a rank.

Of several prompts, each is printed whole when it ends. So are several answers to one prompt.
"""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bireme.cli import options, sampling
from bireme.cli.answers import print_json, print_text
from bireme.cli.grouped import flattened
from bireme.cli.ledger import show_run
from bireme.cli.prompts import read_prompts
from bireme.cli.ranks import print_ranks
from bireme.errors import RequestError

if TYPE_CHECKING:
    from bireme.engine.input_processor import Prompt
    from bireme.engine.llm import LLM
    from bireme.sampling_params import SamplingParams

NAME = "generate"
SHORT = "Continue or answer prompts, streaming."
_DEFAULT_MAX_TOKENS = 128


@flattened
def run(
    model: options.Model,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Texts to continue.")
    ] = None,
    *,
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
    n: sampling.Count = 1,
    temperature: sampling.Temperature = 0.0,
    top_k: sampling.TopK = 0,
    top_p: sampling.TopP = 1.0,
    min_p: sampling.MinP = 0.0,
    repetition_penalty: sampling.RepetitionPenalty = 1.0,
    frequency_penalty: sampling.FrequencyPenalty = 0.0,
    presence_penalty: sampling.PresencePenalty = 0.0,
    seed: sampling.Seed = None,
    min_tokens: sampling.MinTokens = 0,
    ignore_eos: sampling.IgnoreEos = False,
    stop: sampling.Stop = None,
    json_schema: sampling.JsonSchema = None,
    regex: sampling.Regex = None,
    choice: sampling.Choice = None,
    grammar: sampling.Grammar = None,
    logprobs: sampling.TopLogprobs = None,
    prompt_logprobs: sampling.PromptLogprobs = None,
    echo: Annotated[
        bool, typer.Option("--echo", help="Print each prompt before its answers.")
    ] = False,
    engine: options.EngineOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON line an answer.")] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace", metavar="OUT.json", help="Write a Chrome/Perfetto trace, a track a rank."
        ),
    ] = None,
    ledger: options.ShowLedger = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing but the answer.")
    ] = False,
) -> None:
    given = read_prompts(prompts or [], prompts_file)
    if trace is not None:
        options.check_writable(trace, "trace of ours", options.is_trace)
    if not as_json and (logprobs is not None or prompt_logprobs is not None):
        raise RequestError("--logprobs and --prompt-logprobs show with --json alone; add it")
    wanted = sampling.sampling_params(
        n=n, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty, seed=seed, min_tokens=min_tokens,
        max_tokens=_DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
        ignore_eos=ignore_eos, stop=stop, json_schema=json_schema, regex=regex, choice=choice,
        grammar=grammar, logprobs=logprobs, prompt_logprobs=prompt_logprobs,
    )  # fmt: skip
    from bireme.engine.llm import LLM

    with closing(LLM(model, **engine.keywords())) as llm:
        ids = [_as_ids(llm, prompt, chat) for prompt in given]
        params = [
            wanted if max_tokens is not None else _fitting(wanted, llm, prompt) for prompt in ids
        ]
        echoed = [_as_text(llm, prompt, chat) if echo else "" for prompt in given]
        deltas = llm.stream(ids, params)  # refuses what cannot work before a model is loaded
        llm.start()
        if not quiet and not as_json:
            print_ranks(llm)
        try:
            if as_json:
                print_json(deltas, echoed)
            else:
                print_text(deltas, len(given) * n, echoed, has_text=llm.has_tokenizer, quiet=quiet)
        finally:
            if trace is not None:  # of a rank that failed, too
                llm.write_trace(trace)
        if ledger:
            show_run(llm)


def _as_ids(llm: LLM, prompt: Prompt, chat: bool) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    if chat:
        return llm.chat_ids([{"role": "user", "content": prompt}])
    return llm.tokenizer.encode(prompt)


def _as_text(llm: LLM, prompt: Prompt, chat: bool) -> str:
    """What --echo prints: a question on a line of its own."""
    if isinstance(prompt, str):
        return f"{prompt}\n" if chat else prompt
    return llm.tokenizer.decode(prompt) if llm.has_tokenizer else " ".join(map(str, prompt)) + " "


def _fitting(sampling: SamplingParams, llm: LLM, ids: list[int]) -> SamplingParams:
    """Without --max-tokens: what the context leaves, up to the default."""
    room = llm.plan.max_model_len - len(ids)
    return dataclasses.replace(sampling, max_tokens=max(1, min(_DEFAULT_MAX_TOKENS, room)))
