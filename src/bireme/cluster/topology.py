"""Nodes, devices and the links between them: what a plan is made for.

The plain numbers of a device or link (`memory_bytes_per_s`, `latency_s`) are enough to describe it
by hand; curves say the same size by size, and where there is one, it is the better source.
A device is known as `node/device`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import NamedTuple

from bireme.config import DTYPE_BYTES
from bireme.errors import ConfigError


class Point(NamedTuple):
    """What a size takes: the median, and the tenth and ninetieth percentile where it was measured."""

    size: int
    seconds: float
    p10_s: float | None = None
    p90_s: float | None = None

    @property
    def size_per_s(self) -> float:
        return self.size / self.seconds

    @property
    def is_unsteady(self) -> bool:
        """True where the ninetieth percentile is over twice the tenth: something else ran as well."""
        return self.p10_s is not None and self.p90_s is not None and self.p90_s > 2 * self.p10_s


Curve = tuple[Point, ...]  # by rising size
_KINDS = ("cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class Product:
    """[T, in_features] by a weight [out_features, in_features] that no cache holds; sizes are T."""

    dtype: str
    in_features: int
    out_features: int
    curve: Curve

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)
        _check_positive(in_features=self.in_features, out_features=self.out_features)
        _check_curves(curve=self.curve)

    def flop_per_s(self, point: Point) -> float:
        return 2 * self.in_features * self.out_features * point.size_per_s


@dataclass(frozen=True, kw_only=True)
class Device:
    """What one rank runs on: a GPU, or its share of a node's cores.

    `flop_per_s` by dtype, the best of any shape; `memory_bytes_per_s` of reading. Sizes: of `launch`
    operations (host time until one is under way), else bytes, of a copy those read and those written.
    """

    name: str
    kind: str
    model: str = ""
    memory_bytes: int
    num_threads: int | None = None
    flop_per_s: dict[str, float] = field(default_factory=dict)
    memory_bytes_per_s: float | None = None
    launch: Curve = ()
    memory_read: Curve = ()
    memory_copy: Curve = ()
    page_cache_read: Curve = ()
    products: tuple[Product, ...] = ()

    def __post_init__(self) -> None:
        _check_name(self.name)
        if self.kind not in _KINDS:
            raise ConfigError(f"kind {self.kind!r} is not known; use {', '.join(_KINDS)}")
        _check_positive(
            memory_bytes=self.memory_bytes,
            num_threads=self.num_threads,
            memory_bytes_per_s=self.memory_bytes_per_s,
        )
        for dtype, rate in self.flop_per_s.items():
            _check_dtype(dtype)
            _check_positive(flop_per_s=rate)
        _check_curves(
            launch=self.launch,
            memory_read=self.memory_read,
            memory_copy=self.memory_copy,
            page_cache_read=self.page_cache_read,
        )

    @property
    def curves(self) -> list[Curve]:
        own = [self.launch, self.memory_read, self.memory_copy, self.page_cache_read]
        return [*own, *(product.curve for product in self.products)]


@dataclass(frozen=True, kw_only=True)
class Node:
    """One host. Sizes of `empty_step` are ranks: what a step costs in which they do nothing."""

    name: str
    cpu: str = ""
    num_cores: int | None = None
    memory_bytes: int | None = None
    empty_step: Curve = ()
    devices: tuple[Device, ...]

    def __post_init__(self) -> None:
        _check_name(self.name)
        _check_positive(num_cores=self.num_cores, memory_bytes=self.memory_bytes)
        _check_curves(empty_step=self.empty_step)
        _check_unique(f"devices of node {self.name}", [device.name for device in self.devices])


@dataclass(frozen=True, kw_only=True)
class Link:
    """Between any two of `between`, either way: devices, or whole nodes. A message of b bytes takes
    latency_s + b / bytes_per_s; sizes of `send` are bytes. `transport`: what it went through."""

    between: tuple[str, ...]
    transport: str = ""
    latency_s: float
    bytes_per_s: float
    send: Curve = ()

    def __post_init__(self) -> None:
        _check_members("link", self.between)
        _check_positive(latency_s=self.latency_s, bytes_per_s=self.bytes_per_s)
        _check_curves(send=self.send)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Devices whose sums were measured together; sizes of `all_reduce` are bytes of one rank."""

    devices: tuple[str, ...]
    transport: str = ""
    all_reduce: Curve

    def __post_init__(self) -> None:
        _check_members("group", self.devices)
        _check_curves(all_reduce=self.all_reduce)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """How the numbers came about: when, by what, in how long, and how busy the machine was before."""

    date: datetime
    versions: dict[str, str]
    elapsed_s: float
    load_average: float
    is_quick: bool = False


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """`measured` None: described by hand."""

    measured: Measurement | None = None
    nodes: tuple[Node, ...]
    links: tuple[Link, ...] = ()
    groups: tuple[Group, ...] = ()

    @property
    def points(self) -> list[Point]:
        """Of all curves."""
        curves = [node.empty_step for node in self.nodes]
        curves += [curve for node in self.nodes for one in node.devices for curve in one.curves]
        curves += [link.send for link in self.links]
        curves += [group.all_reduce for group in self.groups]
        return [point for curve in curves for point in curve]

    def __post_init__(self) -> None:
        nodes = [node.name for node in self.nodes]
        _check_unique("nodes", nodes)
        devices = [f"{node.name}/{device.name}" for node in self.nodes for device in node.devices]
        for link in self.links:
            _check_known("link", link.between, [*nodes, *devices])
        for group in self.groups:
            _check_known("group", group.devices, devices)


def _check_name(name: str) -> None:
    if not name or "/" in name:
        raise ConfigError(f"name {name!r} must be some text without a /")


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"dtype {dtype!r} is not known; use {', '.join(DTYPE_BYTES)}")


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{name}={value!r} must be a finite number above 0")


def _check_curves(**curves: Curve) -> None:
    for name, curve in curves.items():
        for point in curve:
            _check_positive(
                **{f"a size of {name}": point.size, f"seconds of {name}": point.seconds}
            )
        for before, after in pairwise(curve):
            if before.size >= after.size:
                raise ConfigError(
                    f"{name} has size {after.size} behind {before.size}; sizes must rise"
                )


def _check_unique(what: str, names: Sequence[str]) -> None:
    if not names:
        raise ConfigError(f"{what}: there are none; give at least one")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{what}: {twice} is there twice; give each a name of its own")


def _check_members(what: str, members: Sequence[str]) -> None:
    if len(set(members)) < max(2, len(members)):
        raise ConfigError(f"a {what} joins {', '.join(members)}; name two or more, each once")


def _check_known(what: str, members: Iterable[str], known: Sequence[str]) -> None:
    for member in members:
        if member not in known:
            raise ConfigError(
                f"a {what} names {member}, which is not there; use {', '.join(known)}"
            )
