"""Prompts in a file: a JSON line each."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from bireme.cli.prompts import read_prompts
from bireme.errors import RequestError


def written(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "p.jsonl"
    path.write_bytes(text.encode(encoding))
    return path


def test_lines_end_at_a_line_feed_alone(tmp_path: Path) -> None:
    path = written(tmp_path, '{"prompt": "a\u2028b\u0085c"}\r\n\n{"prompt_token_ids": [5]}')
    assert read_prompts(["x"], path) == ["x", "a\u2028b\u0085c", [5]]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    assert read_prompts([], written(tmp_path, '{"prompt": "a"}', "utf-8-sig")) == ["a"]


def test_a_pipe_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=('{"prompt": "a"}\n',))
    writer.start()
    assert read_prompts([], path) == ["a"]
    writer.join()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "a", "max_tokens": 3}', ":2 holds the key 'max_tokens'; a line holds"),
        ('{"text": "a"}', ":2 holds the key 'text'; a line holds `prompt` or"),
        ('{"prompt": "a", "prompt_token_ids": [1]}', ":2 holds both `prompt` and"),
        ('{"prompt": 7}', ":2 has neither `prompt` (text) nor"),
        ("[1, 2]", ":2 has neither `prompt` (text) nor"),
        ("hello", ":2 is no JSON"),
        ('{"prompt": ""}', "prompt 1 (FILE:2) is empty"),
        ('{"prompt": "a\\ud800"}', "prompt 1 (FILE:2) holds half of a surrogate pair"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(line: str, says: str, tmp_path: Path) -> None:
    path = written(tmp_path, f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(RequestError) as caught:
        read_prompts([], path)
    assert says.replace("FILE", str(path)) in str(caught.value)
    assert str(path) in str(caught.value)
