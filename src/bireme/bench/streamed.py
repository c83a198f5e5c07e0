"""An answer as an OpenAI-compatible server streams it: server-sent events, and what they hold.

https://platform.openai.com/docs/api-reference/completions/streaming
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from bireme.bench.answer import Answer

MAX_LINE_BYTES = 1 << 20


class StreamError(Exception):
    """The server sent an error, or what is no stream of an answer."""


async def read_events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each event. StreamError where a line does not end within MAX_LINE_BYTES."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
        if len(rest) > MAX_LINE_BYTES:
            raise StreamError(f"a line of the stream is longer than {MAX_LINE_BYTES} bytes")


class Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: msgspec.Raw | None = None

    @property
    def text(self) -> str:
        return self.content or self.reasoning_content or self.reasoning or ""

    @property
    def only_says_who(self) -> bool:
        """Chats may begin with a piece that holds no token, sent before there is any."""
        return self.role is not None and not self.text and not self.tool_calls


class Choice(msgspec.Struct):
    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Chunk(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


_DECODER = msgspec.json.Decoder(Chunk)


def read_chunk(data: bytes) -> Chunk | None:
    """What an event holds; None for the last one. StreamError where the server says that it failed."""
    if data == b"[DONE]":
        return None
    try:
        chunk = _DECODER.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StreamError(f"no chunk of a completion: {data[:80]!r}: {error}") from None
    if chunk.error:
        raise StreamError(_message(chunk.error))
    return chunk


class AnswerReader:
    """Takes the events of one answer, each with the time at which it came.

    A piece counts as a token's where it carries text, or may hold the first bytes of a character: not
    where it only says who speaks, or only why the answer ended.
    """

    def __init__(self, num_input_tokens: int, sent_s: float, *, keeps_text: bool) -> None:
        self._sent_s, self._first_s, self._last_s = sent_s, 0.0, sent_s
        self._num_input_tokens, self._num_output_tokens = num_input_tokens, 0
        self._itls = array("d")
        self._texts: list[str] | None = [] if keeps_text else None
        self._is_finished = False

    def take(self, data: bytes, now_s: float) -> bool:
        """True if it was a piece of the answer. StreamError where the server says that it failed."""
        chunk = read_chunk(data)
        if chunk is None:
            self._is_finished = True
            return False
        if chunk.usage:
            self._num_input_tokens = chunk.usage.prompt_tokens or self._num_input_tokens
            self._num_output_tokens = chunk.usage.completion_tokens or self._num_output_tokens
        return bool(chunk.choices) and self._take_piece(chunk.choices[0], now_s)

    def _take_piece(self, choice: Choice, now_s: float) -> bool:
        delta = choice.delta or Delta()
        text = choice.text or delta.text
        self._is_finished |= choice.finish_reason is not None
        if delta.only_says_who and not choice.finish_reason:
            return False
        if not self._first_s:
            self._first_s = now_s
        elif text or delta.tool_calls or not choice.finish_reason:
            self._itls.append(now_s - self._last_s)
        self._last_s = now_s
        if self._texts is not None:
            self._texts.append(text)
        return True

    def answer(self, error: str = "") -> Answer:
        """Tokens as the server counted them, else pieces; cut off without an end is an error too."""
        num_pieces = bool(self._first_s) + len(self._itls)
        if not error and not self._is_finished:
            error = f"the answer was cut off after {num_pieces} pieces"
        if not error and not num_pieces:
            error = "the answer held no token"
        return Answer(
            num_input_tokens=self._num_input_tokens,
            num_output_tokens=self._num_output_tokens or num_pieces,
            ttft_s=self._first_s - self._sent_s if self._first_s else 0.0,
            latency_s=self._last_s - self._sent_s,
            itls=self._itls,
            text="".join(self._texts or ()),
            error=error,
        )


def error_message(body: bytes) -> str:
    """What the body of a refusal says, on one line."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        found = body.decode(errors="replace")
    if isinstance(found, dict):
        found = found.get("error") or found.get("detail") or found.get("message") or found
    return _message(found)


def _message(error: Any) -> str:
    text = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(text).split())[:400]
