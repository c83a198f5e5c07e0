"""Boxes of tensors, one range a dimension: what they have in common, and what they cover."""

from __future__ import annotations

import math
from itertools import pairwise

from bireme.errors import ConfigError

Box = tuple[tuple[int, int], ...]  # (start, stop) a dim
Shape = tuple[int, ...]


def box_shape(box: Box) -> Shape:
    return tuple(stop - start for start, stop in box)


def volume(box: Box) -> int:
    return math.prod(box_shape(box))


def full_box(shape: Shape) -> Box:
    return tuple((0, size) for size in shape)


def intersect(a: Box, b: Box) -> Box | None:
    """The common part of two boxes, None if there is none."""
    common = tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def relative(box: Box, origin: Box) -> Box:
    """`box` in coordinates that start at the corner of `origin`."""
    return tuple((a - o, b - o) for (a, b), (o, _) in zip(box, origin, strict=True))


def as_slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)


def check_disjoint(name: str, boxes: list[Box]) -> None:
    """No two boxes overlap; sorted along the first dim, so that long lists stay cheap."""
    ordered = sorted(boxes)
    active: list[Box] = []
    for box in ordered:
        active = [other for other in active if not box or other[0][1] > box[0][0]]
        if any(intersect(box, other) for other in active):
            raise ConfigError(f"{name}: box {box} is filled twice")
        active.append(box)


def union_volume(boxes: set[Box]) -> int:
    """Elements in the union of boxes (cuts fall along one dim; a recursive sweep serves any)."""
    if not boxes:
        return 0
    if () in boxes:
        return 1
    edges = sorted({edge for box in boxes for edge in box[0]})
    total = 0
    for start, stop in pairwise(edges):
        inner = {box[1:] for box in boxes if box[0][0] <= start and stop <= box[0][1]}
        total += (stop - start) * union_volume(inner)
    return total
