"""`cluster.toml`: a `Cluster` as a file for people and for plans.

Tables are named as the fields are, a point of a curve is [size, seconds] or [size, seconds, p10_s,
p90_s], and what is at its default is left out. Reading gives back what was written, bit by bit.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Iterator
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec

from bireme.cluster.topology import Cluster, Point
from bireme.errors import ConfigError

FORMAT_VERSION = 1
_VERSION_KEY = "format_version"


def read_cluster(path: Path) -> Cluster:
    """ConfigError names the key that is wrong, and what would be right."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no text in UTF-8, as TOML must be") from None
    try:
        return loads(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def write_cluster(path: Path, cluster: Cluster) -> None:
    path.write_text(dumps(cluster), encoding="utf-8")


def loads(text: str) -> Cluster:
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"this is no TOML: {error}") from None
    version = table.pop(_VERSION_KEY, None)
    if version != FORMAT_VERSION:
        found = "is missing" if version is None else f"is {version!r}"
        raise ConfigError(f"{_VERSION_KEY} {found}; this version reads {FORMAT_VERSION}")
    _check_keys(table, Cluster, "")
    try:
        return msgspec.convert(table, Cluster)
    except msgspec.ValidationError as error:
        raise ConfigError(_told(str(error))) from None


def _told(message: str) -> str:
    """msgspec's message with the place first: 'nodes[0].name: Expected `str`, got `int`'."""
    text, _, place = message.partition(" - at `$")
    return f"{place.strip('.`')}: {text}" if place.strip(".`") else text


def _check_keys(value: object, kind: Any, place: str) -> None:
    """ConfigError for a key that no field has; what is of another type altogether is left to msgspec."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            _check_keys(item, kind, f"{place}[{index}]")
    if not isinstance(value, dict):
        return
    known = get_type_hints(kind)
    for key, item in value.items():
        if key not in known:
            where = f"{place} has no key" if place else "there is no key"
            close = get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}" if close else f"the keys are {', '.join(known)}"
            raise ConfigError(f"{where} {key}; {hint}")
        if inner := _dataclass_in(known[key]):
            _check_keys(item, inner, f"{place}.{key}".strip("."))


def _dataclass_in(hint: Any) -> Any:
    """`Node` of `Node`, `tuple[Node, ...]` or `Node | None`; None of anything else."""
    return next((one for one in (hint, *get_args(hint)) if dataclasses.is_dataclass(one)), None)


def dumps(cluster: Cluster) -> str:
    return "\n".join((f"{_VERSION_KEY} = {FORMAT_VERSION}", *_table(cluster, ""))) + "\n"


def _table(value: Any, path: str) -> Iterator[str]:
    """A table's own keys, then the tables inside it."""
    given = [
        (item.name, getattr(value, item.name))
        for item in dataclasses.fields(value)
        if not _is_default(item, getattr(value, item.name))
    ]
    inner = [(name, one) for name, one in given if _is_table(one)]
    for name, one in given:
        if not _is_table(one):
            yield f"{name} = {_value(one)}"
    for name, one in inner:
        below = f"{path}.{name}".strip(".")
        for row in one if isinstance(one, tuple) else (one,):
            yield f"\n[[{below}]]" if isinstance(one, tuple) else f"\n[{below}]"
            yield from _table(row, below)


def _is_default(item: dataclasses.Field[Any], value: object) -> bool:
    if item.default_factory is not dataclasses.MISSING:
        return bool(value == item.default_factory())
    return item.default is not dataclasses.MISSING and bool(value == item.default)


def _is_table(value: object) -> bool:
    first = value[0] if isinstance(value, tuple) and value else value
    return dataclasses.is_dataclass(first)


def _value(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return _string(value)
        case datetime():
            return value.isoformat()
        case dict():
            return "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + " }"
        case Point():
            return _value([number for number in value if number is not None])
        case tuple() if value and isinstance(value[0], Point):
            return "[\n" + "".join(f"  {_value(point)},\n" for point in value) + "]"
    return "[" + ", ".join(map(_value, value)) + "]"


def _string(text: str) -> str:
    """JSON's escapes are TOML's, which wants DEL escaped as well."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _string(key)
