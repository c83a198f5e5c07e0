"""What is wrong with the shape of a body, as pydantic finds it, by the names that a client knows."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_NO_OBJECT = "the body must be a JSON object, sent as application/json"
_PARTS = 'a text, or a list of parts like {"type": "text", "text": "..."}'
# Fields that may be several things.
_RIGHT = {
    "prompt": "a text, token ids, or a list of texts or of token ids",
    "content": _PARTS,
    "output": _PARTS,
    "input": "a text, or a list of items",
    "stop": "a text, or a list of texts",
    "json": "a JSON schema: an object, true, false, or the text of one",
    "tool_choice": 'none, auto, required, or like {"type": "function", "function": {"name": "..."}}',
}


def faults(errors: Sequence[Mapping[str, Any]], body: Any) -> list[Fault]:
    """One a field; of one that may be several things, that which comes closest to what was sent."""
    found: dict[str, Fault] = {}
    for error in errors:
        fault = Fault.of(error, body)
        found[fault.field] = max(found.get(fault.field, fault), fault, key=Fault.depth)
    return list(found.values())


@dataclass(frozen=True)
class Fault:
    """What pydantic says of `path`. Of a field that may be several things it says it for each, and puts
    the names of types into the path, which are left out here."""

    path: tuple[str | int, ...]
    field: str  # as far as it may be one thing
    is_of_type: bool  # none of the several things is what the client has sent
    error: Mapping[str, Any]
    value: Any

    @classmethod
    def of(cls, error: Mapping[str, Any], body: Any) -> Fault:
        """`body` is what the client has sent."""
        path: list[str | int] = []
        types: list[int] = []  # how long the path was at each
        loc, named, found = error["loc"][1:], None, body
        for index, part in enumerate(loc):
            is_missing = error["type"] == "missing" and index == len(loc) - 1
            if not (is_missing or _has(body, part)):
                types.append(len(path))
                continue
            path.append(part)
            body = None if is_missing else body[part]
            if isinstance(part, str):
                named, found = len(path), body
        is_of_type = bool(types) and named is not None and types[-1] >= named
        if is_of_type:
            path = path[:named]
        field = ".".join(map(str, path[: types[0]] if types else path))
        return cls(tuple(path), field, is_of_type, error, found)

    def depth(self) -> int:
        return len(self.path)

    @property
    def where(self) -> str:
        return ".".join(map(str, self.path))

    @property
    def message(self) -> str:
        return self._told(f"={reprlib.repr(self.value)}")

    @property
    def unquoted(self) -> str:
        """The message without what was sent."""
        return self._told("")

    def _told(self, value: str) -> str:
        if not self.path:
            is_no_object = self.error["type"] in ("missing", "model_attributes_type", "dict_type")
            return _NO_OBJECT if is_no_object else f"{self.error['msg']:.200}"
        right = _RIGHT.get(str(self.path[-1]))
        if self.is_of_type and right is not None:
            return f"{self.where:.100}{value} must be {right}"
        return f"{self.where:.100}: {self.error['msg']:.200}"


def _has(value: Any, part: str | int) -> bool:
    if isinstance(value, list):
        return isinstance(part, int) and part < len(value)
    return isinstance(value, dict) and part in value
