"""The prompts that a command was given: texts on its line, then a file with a line a prompt."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bireme.errors import RequestError

if TYPE_CHECKING:
    from bireme.engine.input_processor import Prompt

_KEYS = ("prompt", "prompt_token_ids")


def read_prompts(texts: Sequence[str], path: Path | None = None) -> list[Prompt]:
    """RequestError names the prompt, and its line, that is none."""
    from bireme.text.tokenizer import check_text

    given: list[Prompt] = []
    for where, prompt in _located(texts, path):
        if isinstance(prompt, str):
            check_text(prompt, f"prompt {len(given)}{where}")
        given.append(prompt)
    if not given:
        raise RequestError("no prompt was given; write it behind the model, or use --prompts-file")
    return given


def _located(texts: Sequence[str], path: Path | None) -> Iterator[tuple[str, Prompt]]:
    """Each prompt behind ' (file:line)', which is empty for those of the command line."""
    yield from (("", text) for text in texts)
    for number, line in enumerate(_lines(path) if path else (), 1):
        if line.strip():
            yield f" ({path}:{number})", _read_line(f"{path}:{number}", line)


def read_text(path: Path) -> str:
    """RequestError unless it is a file, or a pipe, of text."""
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
            raise RequestError(f"{path} cannot be read: it is neither a regular file nor a pipe")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is no UTF-8 text: {error}") from None


def _lines(path: Path) -> list[str]:
    """What other line ends there are (U+2028, U+0085) may lie within a JSON text."""
    return read_text(path).split("\n")


def _read_line(where: str, line: str) -> Prompt:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is no JSON: {error}") from None
    fields = entry if isinstance(entry, dict) else {}
    for key in fields:
        if key not in _KEYS:
            raise RequestError(
                f"{where} holds the key {key!r}; a line holds `prompt` or `prompt_token_ids` alone"
            )
    if len(fields) > 1:
        raise RequestError(f"{where} holds both `prompt` and `prompt_token_ids`; give one of them")
    text, ids = (fields.get(key) for key in _KEYS)
    if isinstance(ids, list) and all(type(id_) is int for id_ in ids):
        return ids
    if isinstance(text, str):
        return text
    raise RequestError(
        f"{where} has neither `prompt` (text) nor `prompt_token_ids` (a list of ids)"
    )
