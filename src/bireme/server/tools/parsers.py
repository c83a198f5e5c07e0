"""Styles of tool calls. Each parser takes text as it comes, and says what is content and what a call;
all at once or piece by piece, the result is the same."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bireme.server.tools.scanner import CallScanner


@dataclass(frozen=True, slots=True)
class CallPiece:
    """More of call `index`; `id` and `name` come with its first piece alone."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclass(slots=True)
class Parsed:
    """Content and calls in their order."""

    parts: list[str | CallPiece] = field(default_factory=list)

    @property
    def content(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def calls(self) -> list[CallPiece]:
        return [part for part in self.parts if isinstance(part, CallPiece)]

    def say(self, text: str) -> None:
        if text:
            self.parts.append(text)


class ToolParser(Protocol):
    def add(self, text: str) -> Parsed: ...

    def finish(self) -> Parsed:
        """What was held back at the end."""
        ...


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class _Calls:
    """Numbers calls of the tools in `names`, and tells what is new of the one that is read."""

    def __init__(self, names: Collection[str], *, needs_arguments: bool) -> None:
        self._names, self._needs_arguments = names, needs_arguments
        self._num_begun = 0
        self._is_begun = False

    @property
    def has_any(self) -> bool:
        return self._num_begun > 0

    def is_call(self, scanner: CallScanner) -> bool:
        """Once it is true it stays so."""
        is_whole = scanner.is_done and not self._needs_arguments
        return scanner.name in self._names and (scanner.has_arguments or is_whole)

    def read(self, scanner: CallScanner, text: str, found: Parsed) -> str:
        """Lets a scanner take text; what it leaves."""
        rest = scanner.add(text)
        self._tell(scanner, found)
        return rest

    def finish(self, scanner: CallScanner, found: Parsed) -> None:
        """Tells of one that was cut short."""
        scanner.end()
        self._tell(scanner, found)

    def _tell(self, scanner: CallScanner, found: Parsed) -> None:
        if not self.is_call(scanner):
            return
        if not self._is_begun:
            self._is_begun = True
            found.parts.append(CallPiece(self._num_begun, "", _call_id(), scanner.name))
            self._num_begun += 1
        if more := scanner.take_arguments():
            found.parts.append(CallPiece(self._num_begun - 1, more))
        self._is_begun = not scanner.is_done


class MarkedCalls:
    """Calls between two marks, as Hermes and Qwen write them: `<tool_call>{...}</tool_call>`.

    What stands between marks and names none of the tools is content.
    """

    def __init__(
        self, names: Collection[str], opening: str = "<tool_call>", closing: str = "</tool_call>"
    ) -> None:
        self._opening, self._closing = opening, closing
        self._rest = ""
        self._before = ""  # the object that is read: the mark, and space around it
        self._scanner: CallScanner | None = None
        self._is_behind = False  # an object that is closed, its closing mark to come
        self._calls = _Calls(names, needs_arguments=False)

    def add(self, text: str) -> Parsed:
        self._rest += text
        found = Parsed()
        while self._step(found):
            pass
        return found

    def finish(self) -> Parsed:
        found = Parsed()
        scanner = self._scanner
        if scanner is not None and self._calls.is_call(scanner):
            self._calls.finish(scanner, found)
        elif scanner is not None:
            found.say(self._before + scanner.text + self._rest)
        elif not self._is_behind:
            found.say(self._content(self._rest))
        self._rest, self._scanner = "", None
        return found

    def _step(self, found: Parsed) -> bool:
        """One part of what is left; False where more text is needed."""
        if self._scanner is not None:
            return self._scan(self._scanner, found)
        if self._is_behind:
            return self._pass_mark()
        before, mark, after = self._rest.partition(self._opening)
        if not mark:
            sure = before[: len(before) - _overlap(before, self._opening)]
            sure = sure.rstrip()  # space before a call is none
            found.say(self._content(sure))
            self._rest = before[len(sure) :]
            return False
        said, inner = before.rstrip(), after.lstrip()
        found.say(self._content(said))
        if not inner:
            self._rest = before[len(said) :] + mark + after
            return False
        self._before = before[len(said) :] + mark + after[: len(after) - len(inner)]
        if inner.startswith("{"):
            self._scanner, self._rest = CallScanner(self._closing), inner
        else:
            found.say(self._before)
            self._rest = inner
        return True

    def _content(self, text: str) -> str:
        """Space alone behind a call is none."""
        return "" if self._calls.has_any and not text.strip() else text

    def _scan(self, scanner: CallScanner, found: Parsed) -> bool:
        self._rest = self._calls.read(scanner, self._rest, found)
        if not scanner.is_done:
            return False
        if self._calls.is_call(scanner):
            self._is_behind = True
        else:
            found.say(self._before + scanner.text)
        self._scanner = None
        return True

    def _pass_mark(self) -> bool:
        text = self._rest.lstrip()
        if len(text) < len(self._closing) and self._closing.startswith(text):
            return False
        self._rest = text.removeprefix(self._closing)
        self._is_behind = False
        return True


class BareCalls:
    """Calls that are the whole text, one behind another, as Llama 3 writes them: `{...}; {...}`; with
    `is_list` in brackets.

    From a text on that is no object, or from one that names none of the tools or has no arguments, all
    is content.
    """

    _BETWEEN = ";, \n\t\r[]"

    def __init__(
        self, names: Collection[str], prefix: str = "<|python_tag|>", *, is_list: bool = False
    ) -> None:
        self._prefix, self._is_list = prefix, is_list
        self._rest = ""
        self._before = ""  # the object that is read: what is skipped
        self._is_content = False
        self._scanner: CallScanner | None = None
        self._calls = _Calls(names, needs_arguments=True)

    def add(self, text: str) -> Parsed:
        found = Parsed()
        if self._is_content:
            found.say(text)
            return found
        self._rest += text
        while self._rest and not self._is_content and self._step(found):
            pass
        return found

    def finish(self) -> Parsed:
        found = Parsed()
        scanner = self._scanner
        if scanner is not None and self._calls.is_call(scanner):
            self._calls.finish(scanner, found)
        elif scanner is not None:
            found.say(self._before + scanner.text)
        elif not self._calls.has_any or self._rest.strip(self._BETWEEN):
            found.say(self._rest)
        self._rest, self._scanner = "", None
        return found

    def _step(self, found: Parsed) -> bool:
        if self._scanner is not None:
            return self._scan(self._scanner, found)
        text = self._rest.lstrip(self._BETWEEN if self._is_list or self._calls.has_any else None)
        if not text or (len(text) < len(self._prefix) and self._prefix.startswith(text)):
            return False
        text = text.removeprefix(self._prefix).lstrip()
        if text.startswith("{"):
            self._before = self._rest[: len(self._rest) - len(text)]
            self._scanner, self._rest = CallScanner(), text
            return True
        if text:
            self._leave(self._rest, found)
        return False

    def _scan(self, scanner: CallScanner, found: Parsed) -> bool:
        self._rest = self._calls.read(scanner, self._rest, found)
        if not scanner.is_done:
            return False
        self._scanner = None
        if not self._calls.is_call(scanner):
            self._leave(self._before + scanner.text + self._rest, found)
        return True

    def _leave(self, text: str, found: Parsed) -> None:
        """All from here on is content."""
        found.say(text)
        self._is_content, self._rest = True, ""


class NamedCall:
    """The whole text is the arguments of one call."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def add(self, text: str) -> Parsed:
        name, self._name = self._name, None
        if name is not None:
            return Parsed([CallPiece(0, text, _call_id(), name)])
        return Parsed([CallPiece(0, text)] if text else [])

    def finish(self) -> Parsed:
        return Parsed()


class FirstCall:
    """Of what another parser finds, one call at most."""

    def __init__(self, parser: ToolParser) -> None:
        self._parser = parser

    def add(self, text: str) -> Parsed:
        return self._first(self._parser.add(text))

    def finish(self) -> Parsed:
        return self._first(self._parser.finish())

    def _first(self, found: Parsed) -> Parsed:
        return Parsed([part for part in found.parts if isinstance(part, str) or part.index == 0])


def _overlap(text: str, mark: str) -> int:
    """How many of the last characters may be the beginning of a mark."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)


_STYLES: dict[str, Callable[[Collection[str]], ToolParser]] = {
    "hermes": MarkedCalls,
    "llama3_json": BareCalls,
}


def style_of(template: str | None, wanted: str) -> str | None:
    """The style of a model's calls, by its chat template where `wanted` is auto; None for none."""
    if wanted != "auto":
        return None if wanted == "none" else wanted
    if template is None or "tools" not in template:
        return None
    if "<tool_call>" in template:
        return "hermes"
    return "llama3_json" if "python_tag" in template or "ipython" in template else None


def parser_of(style: str, names: Collection[str]) -> ToolParser:
    """For a request whose tools have these names."""
    return _STYLES[style](names)


def joined(pieces: Sequence[CallPiece]) -> list[CallPiece]:
    """Whole calls, of all their pieces."""
    whole: dict[int, CallPiece] = {}
    for piece in pieces:
        before = whole.get(piece.index)
        whole[piece.index] = (
            piece
            if before is None
            else CallPiece(piece.index, before.arguments + piece.arguments, before.id, before.name)
        )
    return list(whole.values())
