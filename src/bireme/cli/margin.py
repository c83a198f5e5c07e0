"""Text that streams into a terminal beside a margin of figures.

Lines break between words where the margin begins; a line gets its figure when it ends. Control
characters do not reach the terminal: what a model says must not move its cursor.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TextIO

from rich.cells import cell_len

MARGIN_WIDTH = 16
_NARROW = 48  # a narrower terminal has no margin
_TAB = " " * 4


class MarginWriter:
    """Writes to `out`, `columns` wide. `figure` gives the margin of the line of that number."""

    def __init__(self, out: TextIO, columns: int, figure: Callable[[int], str]) -> None:
        self._out, self._figure = out, figure
        self._has_margin = columns >= _NARROW
        self._width = columns - MARGIN_WIDTH - 3 if self._has_margin else columns
        self._word, self._column, self._num_lines = "", 0, 0
        self._is_begun = False  # a line of combining marks has text and no width
        self._is_dim = "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"

    def write(self, text: str) -> None:
        for char in text.replace("\r\n", "\n").replace("\t", _TAB):
            self._take(char)
        self._out.flush()

    def close(self) -> None:
        """Ends the last line, if there is one."""
        self._end_word()
        if self._is_begun:
            self._end_line()
        self._out.flush()

    def _take(self, char: str) -> None:
        if char == "\n":
            self._end_word()
            self._end_line()
        elif char == " ":
            self._end_word()
            self._put(" ")
        elif char.isprintable():
            if cell_len(self._word + char) > self._width:
                self._end_word()
            self._word += char

    def _end_word(self) -> None:
        self._put(self._word)
        self._word = ""

    def _put(self, text: str) -> None:
        """On the next line where there is no place left on this one; a space is lost there."""
        size = cell_len(text)
        if self._column + size > self._width:
            self._end_line()
            text, size = text.lstrip(), cell_len(text.lstrip())
        self._out.write(text)
        self._column += size
        self._is_begun = self._is_begun or bool(text)

    def _end_line(self) -> None:
        if self._has_margin:
            pad = " " * (self._width - self._column)
            figure = f"{self._figure(self._num_lines):<{MARGIN_WIDTH}.{MARGIN_WIDTH}}".rstrip()
            self._out.write(f"{pad} {self.dim('│ ' + figure)}")
        self._out.write("\n")
        self._column, self._num_lines = 0, self._num_lines + 1
        self._is_begun = False

    def dim(self, text: str) -> str:
        return f"\x1b[2m{text}\x1b[22m" if self._is_dim else text
