"""Text beside a margin, and a conversation that drops its oldest turns."""

from __future__ import annotations

import io

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from bireme.cli.chat_partners import busy_seconds
from bireme.cli.conversation import Conversation
from bireme.cli.margin import MARGIN_WIDTH, MarginWriter


@pytest.fixture(autouse=True)
def _no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")


def written(text: str, columns: int, size: int = 3) -> list[str]:
    out = io.StringIO()
    writer = MarginWriter(out, columns, lambda line: f"figure {line}")
    for start in range(0, len(text), size):
        writer.write(text[start : start + size])
    writer.close()
    return out.getvalue().splitlines()


def test_lines_break_between_words_and_end_in_their_figures() -> None:
    lines = written("one two three four five six seven eight nine ten", 60)
    assert lines == [
        "one two three four five six seven eight   │ figure 0",
        "nine ten                                  │ figure 1",
    ]


def test_a_narrow_terminal_has_no_margin() -> None:
    assert written("one two three\n\nfour", 10) == ["one two ", "three", "", "four"]


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=300), st.integers(20, 100), st.integers(1, 7))
@example("\N{COMBINING ACUTE ACCENT}", 48, 1)
@example("\U00011a33", 48, 1)
@example("a\N{COMBINING ACUTE ACCENT}" * 60, 60, 2)
def test_no_line_is_wider_than_the_terminal_and_no_word_is_lost(
    text: str, columns: int, size: int
) -> None:
    lines = written(text, columns, size)
    assert all(cell_len(line) <= columns for line in lines)
    if columns >= 48:
        parts = [line.rpartition("│ figure") for line in lines]
        assert all(cell_len(before) == columns - MARGIN_WIDTH - 2 for before, _, _ in parts)
        lines = [before for before, _, _ in parts]
    shown = "".join(lines)
    expected = "".join(char for char in text if char.isprintable())
    assert shown.replace(" ", "") == expected.replace(" ", "")


def test_a_model_cannot_move_the_cursor() -> None:
    assert "\x1b" not in "".join(written("\x1b[2Jgone\x07", 80))


def test_the_oldest_turn_goes_first_the_system_message_and_the_last_question_stay() -> None:
    conversation = Conversation("be brief")
    for number in range(2):
        conversation.ask(f"question {number}")
        conversation.close_turn(f"answer {number}")
    conversation.ask("question 2")
    assert conversation.drop_oldest()
    assert [message["content"] for message in conversation.messages()] == [
        "be brief", "question 1", "answer 1", "question 2",
    ]  # fmt: skip
    assert conversation.drop_oldest()
    assert not conversation.drop_oldest()


def test_a_question_without_an_answer_is_taken_back() -> None:
    conversation = Conversation()
    conversation.ask("what")
    conversation.close_turn("")
    assert conversation.messages() == []


def test_counters_of_stages_are_the_mean_over_replicas() -> None:
    text = (
        "# TYPE bireme:rank_busy_seconds_total counter\n"
        'bireme:rank_busy_seconds_total{replica="0",stage="0"} 2.5\n'
        'bireme:rank_busy_seconds_total{replica="1",stage="0"} 1.5\n'
        'bireme:rank_busy_seconds_total{stage="1",replica="0"} 1e1\n'
        "bireme:num_requests_running 3\n"
    )
    assert busy_seconds(text) == {0: 2.0, 1: 10.0}
