"""A trace of requests as Azure publishes them: when each came, and how long it and its answer were.

CSV with the columns TIMESTAMP, ContextTokens and GeneratedTokens
(https://github.com/Azure/AzurePublicDataset). The texts are not published, so they are made up.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from bireme.errors import RequestError

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class TracedRequest(NamedTuple):
    """`offset_s` counts from the first request of the trace."""

    offset_s: float
    input_len: int
    output_len: int

    def within(self, max_model_len: int) -> TracedRequest:
        """Cut where prompt and answer do not fit: first the prompt, which keeps one token at least."""
        output_len = min(self.output_len, max_model_len - 1)
        return TracedRequest(
            self.offset_s, min(self.input_len, max_model_len - output_len), output_len
        )


@dataclass(frozen=True)
class AzureTrace:
    """Requests in the order of their arrival; `num_cut` of them were too long."""

    requests: list[TracedRequest]
    num_cut: int

    def offsets(self, speed: float) -> Iterator[float]:
        return (request.offset_s / speed for request in self.requests)


def read_trace(
    path: Path, num_requests: int | None = None, max_model_len: int | None = None
) -> AzureTrace:
    """The first `num_requests`, or all. RequestError names the line that is no request."""
    if max_model_len is not None and max_model_len < 2:
        raise RequestError(f"max_model_len={max_model_len} must be at least 2")
    with path.open(encoding="utf-8-sig", newline="") as file:
        whole = list(islice(_requests(path, csv.DictReader(file)), num_requests))
    if len(whole) < (num_requests or 1):
        raise RequestError(
            f"{path} holds {len(whole)} requests, {num_requests or 1} are asked for; "
            "lower --num-prompts, or name a longer trace"
        )
    cut = whole if max_model_len is None else [each.within(max_model_len) for each in whole]
    return AzureTrace(cut, sum(map(TracedRequest.__ne__, whole, cut)))


def _requests(path: Path, rows: csv.DictReader[str]) -> Iterator[TracedRequest]:
    missing = [name for name in COLUMNS if name not in _header(path, rows)]
    if missing:
        raise RequestError(
            f"{path} has no column {missing[0]}; its first line must name {', '.join(COLUMNS)}"
        )
    first, last = None, 0.0
    for row in rows:
        where = f"{path}:{rows.line_num}"
        came, input_len, output_len = _read_row(where, row)
        first = first or came
        offset = (came - first).total_seconds()
        if offset < last:
            raise RequestError(
                f"{where} came {last - offset:g} s before the line above; sort the trace by time"
            )
        last = offset
        yield TracedRequest(offset, input_len, output_len)


def _header(path: Path, rows: csv.DictReader[str]) -> list[str]:
    try:
        return list(rows.fieldnames or ())
    except (csv.Error, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is no CSV: {error}") from None


def _read_row(where: str, row: dict[str, str]) -> tuple[datetime, int, int]:
    """An empty prompt or answer counts as one token: nothing less can be asked for."""
    time, *lengths = (row[name] or "" for name in COLUMNS)
    try:
        input_len, output_len = (max(1, int(length)) for length in lengths)
        return datetime.fromisoformat(time), input_len, output_len
    except ValueError:
        raise RequestError(
            f"{where} holds {time!r:.40}, {lengths[0]!r:.20} and {lengths[1]!r:.20}, "
            "no time and two numbers of tokens"
        ) from None
