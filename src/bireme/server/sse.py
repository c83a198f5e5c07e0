"""Server-sent events."""

from __future__ import annotations


def sse(body: bytes, event: str | None = None) -> bytes:
    """One event; JSON holds no line end."""
    head = b"" if event is None else b"event: " + event.encode() + b"\n"
    return head + b"data: " + body + b"\n\n"


DONE = sse(b"[DONE]")
