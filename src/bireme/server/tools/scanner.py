"""One call in JSON, `{"name": ..., "arguments": {...}}`, read while it comes."""

from __future__ import annotations

import json

_ARGUMENTS = ("arguments", "parameters")


class CallScanner:
    """Takes text from the opening brace on; `name` is there once it is read, arguments as they are
    written. `is_done` once the object is closed, well-formed or not, or `closing` comes outside of a
    string.

    Of names and of arguments the first counts; without arguments they are `{}`.
    """

    def __init__(self, closing: str = "") -> None:
        self.name: str | None = None
        self.is_done = self.has_arguments = False
        self._closing = closing
        self._taken: list[str] = []
        self._depth = 0
        self._is_string = self._is_escaped = False
        self._string: list[str] = []  # the one that is read, or was last
        self._key: str | None = None  # of the outermost object
        self._is_value = self._is_argument = False
        self._arguments: list[str] = []  # not told yet
        self._spaces: list[str] = []  # behind them, and perhaps none of theirs
        self._is_whole = False  # arguments that are no object: their end is waited for

    @property
    def text(self) -> str:
        """All that was taken."""
        return "".join(self._taken)

    def add(self, text: str) -> str:
        """What is left of it: all behind the object, or what may begin `closing`."""
        for index, char in enumerate(text):
            if not self._is_string and self._may_close(text, index):
                if text.startswith(self._closing, index):
                    self.end()
                return self._take(text, index)
            self._add(char)
            if self.is_done:
                return self._take(text, index + 1)
        return self._take(text, len(text))

    def _may_close(self, text: str, index: int) -> bool:
        begun = text[index : index + len(self._closing)]
        return bool(begun) and self._closing.startswith(begun)

    def _take(self, text: str, end: int) -> str:
        self._taken.append(text[:end])
        return text[end:]

    def end(self) -> None:
        """No more of it comes."""
        self._end_value()
        self.is_done = True
        if not self.has_arguments:
            self._arguments = ["{}"]

    def take_arguments(self) -> str:
        """What is new of them."""
        if self._is_whole:
            return ""
        found = "".join(self._arguments)
        self._arguments.clear()
        return found

    def _add(self, char: str) -> None:
        if self._is_string:
            self._go_on_in_string(char)
        elif char == '"':
            self._is_string, self._string = True, [char]
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        elif self._depth == 1 and char in ":,":
            self._turn(char)
            return
        if self._depth == 0:
            self.end()
        elif self._is_argument:
            self._grow(char)

    def _go_on_in_string(self, char: str) -> None:
        self._string.append(char)
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._is_string = False
            if self._depth == 1 and not self._is_value:
                self._key = _loads(self._string)
            elif self._depth == 1 and self._key == "name" and self.name is None:
                self.name = _loads(self._string)

    def _turn(self, char: str) -> None:
        """From a key to its value, or from a value to the next key."""
        if char == ",":
            self._end_value()
        elif not self._is_value:
            self._is_value = True
            self._is_argument = self._key in _ARGUMENTS and not self.has_arguments

    def _grow(self, char: str) -> None:
        if char.isspace() and not self._is_string:
            self._spaces.append(char)
            return
        if self.has_arguments:
            self._arguments += self._spaces
        else:
            self.has_arguments, self._is_whole = True, char != "{"
        self._spaces.clear()
        self._arguments.append(char)

    def _end_value(self) -> None:
        if self._is_whole:
            self._is_whole, self._arguments = False, [_unquoted("".join(self._arguments))]
        self._is_value = self._is_argument = False
        self._key = None
        self._spaces.clear()


def _unquoted(arguments: str) -> str:
    """Of a text what it holds, of nothing `{}`; what is no JSON as it is."""
    if arguments == "null":
        return "{}"
    text = _loads([arguments])
    return arguments if text is None else text or "{}"


def _loads(chars: list[str]) -> str | None:
    try:
        value = json.loads("".join(chars))
    except ValueError:
        return None
    return value if isinstance(value, str) else None
