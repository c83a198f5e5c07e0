"""A streamed answer, read from scripted events."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bireme.bench.answer import Answer
from bireme.bench.streamed import AnswerReader, StreamError, error_message, read_events


def read(*events: str, keeps_text: bool = True) -> Answer:
    reader = AnswerReader(7, 100.0, keeps_text=keeps_text)
    for number, event in enumerate(events, 1):
        reader.take(event.encode(), 100.0 + number)
    return reader.answer()


def piece(text: str, finish: str = "null") -> str:
    return f'{{"choices": [{{"text": "{text}", "finish_reason": {finish}}}]}}'


def delta(content: str, finish: str = "null") -> str:
    return f'{{"choices": [{{"delta": {content}, "finish_reason": {finish}}}]}}'


def test_an_answer_is_timed_by_its_pieces_and_counted_by_the_server() -> None:
    usage = '{"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 5}}'
    answer = read(piece("a"), piece(""), piece("b", '"length"'), usage, "[DONE]")
    assert answer.text == "ab"
    assert (answer.num_input_tokens, answer.num_output_tokens) == (9, 5)
    assert (answer.ttft_s, answer.latency_s, list(answer.itls)) == (1, 3, [1, 1])
    assert answer.tpot_s == 0.5
    assert not answer.error


def test_without_usage_pieces_are_counted() -> None:
    answer = read(piece("a"), piece("b"), "[DONE]", keeps_text=False)
    assert (answer.num_input_tokens, answer.num_output_tokens, answer.text) == (7, 2, "")


def test_a_chat_is_timed_from_its_first_token_not_from_its_role_nor_to_its_reason() -> None:
    answer = read(
        delta('{"role": "assistant", "content": ""}'),
        delta('{"reasoning_content": "hm"}'),
        delta('{"content": "a"}'),
        delta("{}", '"stop"'),
    )
    assert (answer.ttft_s, answer.latency_s, list(answer.itls)) == (2, 4, [1])
    assert answer.num_output_tokens == 2


@pytest.mark.parametrize(
    ("events", "error"),
    [
        ([piece("a")], "the answer was cut off after 1 pieces"),
        ([], "the answer was cut off after 0 pieces"),
        (["[DONE]"], "the answer held no token"),
    ],
)
def test_half_an_answer_is_an_error(events: list[str], error: str) -> None:
    assert read(*events).error == error


@pytest.mark.parametrize(
    ("event", "complaint"),
    [
        ('{"error": {"message": "out of\\nmemory"}}', "^out of memory$"),
        ("<html>", "no chunk of a completion"),
        ('{"choices": 3}', "no chunk of a completion"),
    ],
)
def test_an_event_that_is_no_piece_says_so(event: str, complaint: str) -> None:
    with pytest.raises(StreamError, match=complaint):
        read(event)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "too long", "code": 400}}', "too long"),
        (b'{"detail": "not found"}', "not found"),
        (b"<h1>Bad\n Gateway</h1>", "<h1>Bad Gateway</h1>"),
        (b'{"error": "no"}', "no"),
        (b"", ""),
    ],
)
def test_a_refusal_is_told_on_one_line(body: bytes, message: str) -> None:
    assert error_message(body) == message


async def _events(stream: bytes, size: int) -> list[bytes]:
    async def pieces():  # type: ignore[no-untyped-def]
        for start in range(0, len(stream), size):
            yield stream[start : start + size]

    return [event async for event in read_events(pieces())]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40))
def test_events_are_found_however_the_stream_is_cut(size: int) -> None:
    stream = b': ping\r\n\r\ndata: {"a": 1}\n\ndata:2\r\n\r\nevent: x\ndata: [DONE]\n\n'
    assert asyncio.run(_events(stream, size)) == [b'{"a": 1}', b"2", b"[DONE]"]


def test_a_line_without_an_end_is_refused() -> None:
    with pytest.raises(StreamError, match="longer than 1048576 bytes"):
        asyncio.run(_events(b"data: " + b"x" * (3 << 20), 1 << 18))
