"""Readers of one value of a config.json: each takes what JSON can be and gives what it must be."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from bireme.errors import ConfigError

T = TypeVar("T")
Reader = Callable[[Any], T]

LARGEST_SIZE = 10**8


class Unfit(Exception):
    """Says what would be right."""


def read(name: str, value: Any, reader: Reader[T], file: str = "config.json") -> T:
    """ConfigError names the field where `reader` does not take its value."""
    try:
        return reader(value)
    except Unfit as needed:
        raise ConfigError(
            f"{file} gives {name} {reprlib.repr(value)}; {needed} is needed"
        ) from None


def flag(value: Any) -> bool:
    if type(value) is not bool:
        raise Unfit("true or false")
    return value


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise Unfit("a name")
    return value


def whole(least: int = 1, most: int = LARGEST_SIZE) -> Reader[int]:
    def reader(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise Unfit(f"a whole number from {least} to {most}")
        return value

    return reader


def number(least: float = 0.0, most: float = 1e12) -> Reader[float]:
    def reader(value: Any) -> float:
        if type(value) not in (int, float) or not least <= value <= most:
            raise Unfit(f"a number from {least:g} to {most:g}")
        return float(value)

    return reader


def one_of(names: Collection[str]) -> Reader[str]:
    def reader(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise Unfit(f"one of {', '.join(names)}")
        return value

    return reader


def list_of(reader: Reader[T]) -> Reader[tuple[T, ...]]:
    def read_list(value: Any) -> tuple[T, ...]:
        if not isinstance(value, (list, tuple)):
            raise Unfit("a list")
        try:
            return tuple(map(reader, value))
        except Unfit as needed:
            raise Unfit(f"a list with {needed} in each place") from None

    return read_list


def optional(reader: Reader[T]) -> Reader[T | None]:
    """Null means that there is none."""
    return lambda value: None if value is None else reader(value)
