"""What a load generator sends: a prompt, and how many tokens to ask for.

Each query is made when it is about to be sent, the same for the same seed and index, so that a long
run holds none that wait. Indices beyond the number of prompts are for warming up.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

from bireme.bench.azure_trace import TracedRequest
from bireme.bench.workload import check_lengths, draw_length
from bireme.errors import RequestError

# Of one token each in most vocabularies, with the space in front.
_WORDS = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or "
    "had an they which one you were all her she there would their we him been has when who will no "
    "more if out so up said what its about than into them can only other time new some could these"
).split()


class Query(NamedTuple):
    """`input_len` is what was asked for; of a text the server knows better."""

    prompt: str | list[int]
    input_len: int
    output_len: int


class Queries(Protocol):
    def __len__(self) -> int: ...

    def query(self, index: int) -> Query: ...


@dataclass(frozen=True, kw_only=True)
class MadeUp:
    """Token ids below `vocab_size`, evenly drawn, or English words (`as_text`) of about a token each.

    Ids below 256 are single bytes or special tokens in most vocabularies; all of them have that many.
    """

    vocab_size: int = 256
    as_text: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise RequestError(f"vocab_size={self.vocab_size} must be at least 1")

    def prompt(self, draw: random.Random, length: int, prefix_len: int = 0) -> str | list[int]:
        """`prefix_len` tokens that all prompts begin with, then `length` of its own."""
        shared = random.Random(f"prefix {self.seed}")
        if self.as_text:
            return " ".join(shared.choices(_WORDS, k=prefix_len) + draw.choices(_WORDS, k=length))
        ids = range(self.vocab_size)
        return shared.choices(ids, k=prefix_len) + draw.choices(ids, k=length)

    def draw(self, index: int) -> random.Random:
        return random.Random(f"query {self.seed} {index}")


@dataclass(frozen=True, kw_only=True)
class RandomQueries:
    """`num_prompts` of `input_len` tokens behind `prefix_len` shared ones; lengths vary by
    `range_ratio` either way, evenly drawn."""

    made_up: MadeUp
    num_prompts: int
    input_len: int
    output_len: int
    range_ratio: float = 0.0
    prefix_len: int = 0

    def __post_init__(self) -> None:
        check_lengths(self.num_prompts, self.input_len, self.output_len, self.range_ratio)
        if self.prefix_len < 0:
            raise RequestError(f"random_prefix_len={self.prefix_len} must be at least 0")

    def __len__(self) -> int:
        return self.num_prompts

    def query(self, index: int) -> Query:
        draw = self.made_up.draw(index)
        input_len, output_len = (
            draw_length(draw, mean, self.range_ratio) for mean in (self.input_len, self.output_len)
        )
        prompt = self.made_up.prompt(draw, input_len, self.prefix_len)
        return Query(prompt, self.prefix_len + input_len, output_len)


@dataclass(frozen=True)
class TraceQueries:
    """Made-up prompts of the lengths that a trace has."""

    made_up: MadeUp
    requests: Sequence[TracedRequest]

    def __len__(self) -> int:
        return len(self.requests)

    def query(self, index: int) -> Query:
        _, input_len, output_len = self.requests[index % len(self)]
        prompt = self.made_up.prompt(self.made_up.draw(index), input_len)
        return Query(prompt, input_len, output_len)


@dataclass(frozen=True)
class FileQueries:
    """The prompts of a file, in their order."""

    given: list[Query]

    def __len__(self) -> int:
        return len(self.given)

    def query(self, index: int) -> Query:
        return self.given[index % len(self)]


def read_queries(
    path: Path, output_len: int, num_prompts: int | None = None, *, needs_text: bool = False
) -> FileQueries:
    """A line a prompt: {"prompt": text or ids, "output_len": n}; `output_len` where a line has none.

    The first `num_prompts`, or all. RequestError names the line that is no prompt; with `needs_text`,
    as chats do, ids are none.
    """
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        given = list(islice(_queries(path, file, output_len), num_prompts))
    for number, query in enumerate(given):
        if needs_text and not isinstance(query.prompt, str):
            raise RequestError(f"{path}: prompt {number} is of token ids; a chat takes text alone")
    if len(given) < (num_prompts or 1):
        raise RequestError(
            f"{path} holds {len(given)} prompts, {num_prompts or 1} are asked for; "
            "lower --num-prompts, or name a longer file"
        )
    return FileQueries(given)


def _queries(path: Path, lines: Iterator[str], output_len: int) -> Iterator[Query]:
    try:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _read_line(f"{path}:{number}", line, output_len)
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is no UTF-8 text: {error}") from None


def _read_line(where: str, line: str, output_len: int) -> Query:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is no JSON: {error}") from None
    fields = entry if isinstance(entry, dict) else {}
    prompt = fields.get("prompt")
    wanted = fields.get("output_len", fields.get("output_tokens", output_len))
    if not (prompt and (isinstance(prompt, str) or _is_ids(prompt))):
        raise RequestError(f"{where} has no `prompt`: a text, or a list of token ids")
    if type(wanted) is not int or wanted < 1:
        raise RequestError(f"{where} has output_len={wanted!r:.20}; it must be at least 1")
    return Query(prompt, 0 if isinstance(prompt, str) else len(prompt), wanted)


def _is_ids(prompt: object) -> bool:
    return isinstance(prompt, list) and all(type(id_) is int and id_ >= 0 for id_ in prompt)
