"""One call in JSON, `{"name": ..., "arguments": {...}}`, read while it comes."""

from __future__ import annotations

import json

_ARGUMENTS = ("arguments", "parameters")


class CallScanner:
    """Takes text from the opening brace on; `name` and `arguments` grow, the latter as it is written.

    `text` is all that was taken; `is_done` once the object is closed, well-formed or not.
    """

    def __init__(self) -> None:
        self.text = ""
        self.name: str | None = None
        self.arguments = ""
        self.is_done = False
        self._depth = 0
        self._string: str | None = None  # the one that is being read, as it is written
        self._is_escaped = False
        self._key: str | None = None  # of the outermost object
        self._is_value = False
        self._value = ""

    @property
    def is_call(self) -> bool:
        """True for a finished object that names a function."""
        return self.is_done and self.name is not None

    def add(self, text: str) -> str:
        """What follows the object, once it is closed."""
        for index, char in enumerate(text):
            self._add(char)
            if self.is_done:
                self.text += text[: index + 1]
                return text[index + 1 :]
        self.text += text
        return ""

    def _add(self, char: str) -> None:
        if self._string is not None:
            self._go_on_in_string(char)
        elif char == '"':
            self._string = char
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        elif self._depth == 1 and char in ":,":
            self._turn(char)
            return
        if self._depth == 0:
            self._end_value()
            self.is_done = True
        elif self._is_value:
            self._grow(char)

    def _go_on_in_string(self, char: str) -> None:
        assert self._string is not None
        self._string += char
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            if self._depth == 1 and not self._is_value:
                self._key = _loads(self._string)
            elif self._depth == 1 and self._key == "name":
                self.name = _loads(self._string)
            self._string = None

    def _turn(self, char: str) -> None:
        """From a key to its value, or from a value to the next key."""
        if char == ":":
            self._is_value, self._value = True, ""
        else:
            self._end_value()

    def _grow(self, char: str) -> None:
        if self._key not in _ARGUMENTS or (not self._value and char.isspace()):
            return
        self._value += char
        if not self._value.startswith('"'):  # of a text the end is waited for
            self.arguments = self._value.rstrip() if self._string is None else self._value

    def _end_value(self) -> None:
        if self._key in _ARGUMENTS and self._value.startswith('"'):
            self.arguments = _loads(self._value.rstrip()) or ""
        self._is_value, self._key, self._value = False, None, ""


def _loads(text: str) -> str | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
