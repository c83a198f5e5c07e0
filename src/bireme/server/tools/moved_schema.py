"""JSON schemas within others: a reference counts from the root of the document that it stands in."""

from __future__ import annotations

from typing import Any

from bireme.server.errors import ApiError

_BY_NAME = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
_VALUES = ("const", "enum", "default", "examples")  # which hold no schema, whatever they look like


def moved(schema: dict[str, Any], place: str) -> dict[str, Any]:
    """A schema as it must be to stand at `place`, such as `#/$defs/a`, and mean the same; ApiError 400
    for one that nests too deep."""
    try:
        return {key: _moved_under(key, value, place) for key, value in schema.items()}
    except RecursionError:
        raise ApiError(
            400, "tools hold a schema that nests too deep; use a flatter one", param="tools"
        ) from None


def _moved_under(key: str, value: Any, place: str) -> Any:
    if key in _VALUES:
        return value
    if key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
        return place + value[1:]
    if key in _BY_NAME and isinstance(value, dict):
        return {name: _moved(one, place) for name, one in value.items()}
    return _moved(value, place)


def _moved(value: Any, place: str) -> Any:
    if isinstance(value, list):
        return [_moved(one, place) for one in value]
    if isinstance(value, dict):
        return {key: _moved_under(key, one, place) for key, one in value.items()}
    return value
