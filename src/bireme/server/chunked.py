"""Answers in chunks, as chat and completions stream them: all that differs between two of them are their
choices, so the rest is written once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bireme.server.errors import ApiError, FieldNames
from bireme.server.protocol.common import Sent, Usage
from bireme.server.sse import DONE, sse
from bireme.server.usage import UsageOf


class ChunkedReply:
    """Base of such replies. `empty` is a chunk whose last field that is set is `choices`, with none."""

    def __init__(self, empty: Sent, usage: UsageOf, names: FieldNames) -> None:
        head, self._usage, self._names = empty.as_json(), usage, names
        assert head.endswith(b'"choices":[]}')
        self._head = head.removesuffix(b"]}")

    def chunk(
        self, choices: Sequence[Sent], extra: Mapping[str, Sent | Sequence[int] | None]
    ) -> bytes:
        """One event; `extra` are further fields of the chunk."""
        told = b",".join([choice.as_json() for choice in choices])
        more = b"".join([b',"%s":%s' % (name.encode(), _json(it)) for name, it in extra.items()])
        return sse(self._head + told + b"]" + more + b"}")

    def end(self, usage: Usage) -> bytes:
        last = self._usage.at_end(usage)
        return (self.chunk([], last) if last else b"") + DONE

    def failed(self, error: ApiError) -> bytes:
        return sse(self._names.told(error).as_json()) + DONE


def _json(value: Sent | Sequence[int] | None) -> bytes:
    if isinstance(value, Sent):
        return value.as_json()
    return b"null" if value is None else str(list(value)).encode()
