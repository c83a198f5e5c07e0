"""Answers in chunks, as chat and completions stream them: all that differs between two of them are their
choices, so the rest is written once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic_core import to_json

from bireme.server.errors import ApiError, FieldNames
from bireme.server.protocol.common import Sent, Usage
from bireme.server.sse import DONE, sse
from bireme.server.usage import UsageOf


class ChunkedReply:
    """Base of such replies. `empty` is a chunk whose last field that is set is `choices`, with none."""

    def __init__(self, empty: Sent, usage: UsageOf, names: FieldNames) -> None:
        self._head, self._usage, self._names = head_of(empty), usage, names

    def chunk(self, choices: Iterable[Sent], extra: Mapping[str, Any]) -> bytes:
        """One event; `extra` are further fields of the chunk."""
        return sse(self.filled(choices, extra))

    def filled(self, choices: Iterable[Sent], extra: Mapping[str, Any]) -> bytes:
        return filled(self._head, choices, extra)

    def end(self, usage: Usage) -> bytes:
        last = self._usage.at_end(usage)
        return (self.chunk([], last) if last else b"") + DONE

    def failed(self, error: ApiError) -> bytes:
        return sse(self._names.told(error).as_json()) + DONE


def head_of(empty: Sent) -> bytes:
    """All of it that comes before the first choice."""
    head = empty.as_json()
    assert head.endswith(b'"choices":[]}')
    return head.removesuffix(b"]}")


def filled(head: bytes, choices: Iterable[Sent], extra: Mapping[str, Any]) -> bytes:
    """With choices and further fields. Each choice by itself, so that no thread waits for all."""
    told = b",".join([choice.as_json() for choice in choices])
    more = b"".join([b',"%s":%s' % (name.encode(), _json(it)) for name, it in extra.items()])
    return head + told + b"]" + more + b"}"


def _json(value: Any) -> bytes:
    return value.as_json() if isinstance(value, Sent) else to_json(value)
