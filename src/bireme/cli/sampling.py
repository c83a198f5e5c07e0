"""Options that say how tokens are chosen, and what they become."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bireme.cli.prompts import read_text
from bireme.sampling_params import SamplingParams, StructuredOutputsParams

Count = Annotated[int, typer.Option("--n", metavar="N", help="Answers to each prompt.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 is greedy.")]
TopK = Annotated[
    int, typer.Option("--top-k", help="Draw from the k likeliest tokens; 0: from all.")
]
TopP = Annotated[
    float,
    typer.Option("--top-p", help="Draw from the likeliest tokens of this total probability."),
]
MinP = Annotated[
    float,
    typer.Option(
        "--min-p", help="Draw from tokens at least this times as likely as the likeliest."
    ),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(
        "--repetition-penalty", help="Above 1: less of what the prompt or the answer has said."
    ),
]
FrequencyPenalty = Annotated[
    float,
    typer.Option("--frequency-penalty", help="Above 0: less of a token, the oftener it was said."),
]
PresencePenalty = Annotated[
    float, typer.Option("--presence-penalty", help="Above 0: less of a token that was said.")
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Makes sampling repeatable, at any layout.")
]
MinTokens = Annotated[
    int, typer.Option("--min-tokens", metavar="N", help="Tokens before anything may end an answer.")
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end-of-text token.")]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="End before this text; may be given repeatedly."),
]
TopLogprobs = Annotated[
    int | None,
    typer.Option(
        "--logprobs",
        metavar="K",
        help="With --json: log-probabilities of the answer's tokens, and of the K likeliest.",
    ),
]
PromptLogprobs = Annotated[
    int | None,
    typer.Option("--prompt-logprobs", metavar="K", help="With --json: the same of the prompt."),
]
JsonSchema = Annotated[
    str | None,
    typer.Option(
        "--json-schema",
        metavar="FILE|JSON",
        help="Answer with JSON of this schema: a file, or the schema itself.",
    ),
]
Regex = Annotated[
    str | None,
    typer.Option("--regex", metavar="RE", help="Answer with what this regular expression matches."),
]
Choice = Annotated[
    list[str] | None,
    typer.Option("--choice", metavar="TEXT", help="Answer with one of these; give it repeatedly."),
]
Grammar = Annotated[
    Path | None,
    typer.Option(
        "--grammar", metavar="FILE", help="Answer with a text of this Lark or GBNF grammar."
    ),
]


def sampling_params(
    *,
    stop: Sequence[str] | None,
    json_schema: str | None,
    regex: str | None,
    choice: Sequence[str] | None,
    grammar: Path | None,
    **settings: Any,
) -> SamplingParams:
    """RequestError for what cannot work; `settings` are further fields of `SamplingParams`."""
    wanted = {
        "json": None if json_schema is None else _schema(json_schema),
        "regex": regex,
        "choice": choice or None,
        "grammar": None if grammar is None else read_text(grammar),
    }
    is_structured = any(value is not None for value in wanted.values())
    structured = StructuredOutputsParams(**wanted) if is_structured else None  # type: ignore[arg-type]
    return SamplingParams(stop=tuple(stop or ()), structured_outputs=structured, **settings)


def _schema(text: str) -> str:
    """A JSON object stands for itself, anything else names a file."""
    return text if text.lstrip().startswith("{") else read_text(Path(text))
