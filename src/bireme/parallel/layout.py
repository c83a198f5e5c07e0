"""The one home of slicing: which box of which checkpoint tensor lies where in which rank's parameter.

A `Source` is a tensor of the checkpoint, seen through a `View` as a *logical* tensor ([out, in],
query rows before key rows before value rows). A `ParamLayout` lists the `Piece`s that fill one
rank's parameter. Local area without a piece is declared padding; a box that several ranks hold is
replication. The sharder, the loader, the memory model and `inspect` read these and slice nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

from bireme.errors import ConfigError

Box = tuple[tuple[int, int], ...]  # (start, stop) a dim
Shape = tuple[int, ...]
CutKind = Literal["column", "row", "vocabulary", "replicated"]

MLP_UNITS = (128, 64, 32, 16, 8, 1)
VOCABULARY_UNIT = 64
MAX_IMBALANCE = 0.05


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


@dataclass(frozen=True, slots=True)
class View:
    """An invertible way to see a tensor of a file as a logical tensor.

    - identity: as it is;
    - transpose: [in, out] in the file (GPT-2's Conv1D), [out, in] logically;
    - interleave: rows in the file are (head, part, unit) (BLOOM's and GPT-NeoX's fused QKV with
      3 parts), logically (part, head, unit).
    """

    kind: Literal["identity", "transpose", "interleave"] = "identity"
    num_parts: int = 1
    unit: int = 1

    def file_shape(self, shape: Shape) -> Shape:
        return shape[::-1] if self.kind == "transpose" else shape

    def file_boxes(self, box: Box, shape: Shape) -> Iterator[tuple[Box, Box]]:
        """Boxes in the file that make up the logical `box`, each with where it goes within `box`.

        A transposed file box is to be transposed after reading.
        """
        inner = relative(box, box)
        if self.kind == "identity":
            yield box, inner
        elif self.kind == "transpose":
            yield box[::-1], inner
        else:
            yield from self._interleaved(box, shape)

    def _interleaved(self, box: Box, shape: Shape) -> Iterator[tuple[Box, Box]]:
        (first, last), rest = box[0], box[1:]
        num_heads = shape[0] // (self.num_parts * self.unit)
        start = first
        while start < last:
            block, within = divmod(start, self.unit)
            part, head = divmod(block, num_heads)
            stop = min(last, (block + 1) * self.unit)
            at = (head * self.num_parts + part) * self.unit + within
            rows = (start - first, stop - first)
            yield ((at, at + stop - start), *rest), (rows, *relative(rest, rest))
            start = stop

    def __str__(self) -> str:
        return (
            self.kind if self.kind != "interleave" else f"interleave:{self.num_parts}:{self.unit}"
        )

    @classmethod
    def parse(cls, text: str) -> View:
        kind, *numbers = text.split(":")
        return cls(kind, *map(int, numbers))  # type: ignore[arg-type]


IDENTITY = View()
TRANSPOSE = View("transpose")


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint tensor under its canonical file name; `shape` is logical."""

    name: str
    shape: Shape
    view: View = IDENTITY

    @property
    def inverse(self) -> Source:
        """The tensor as in its file, seen through a view of the logical one."""
        view = self.view
        if view.kind == "interleave":
            view = View("interleave", self.shape[0] // (view.num_parts * view.unit), view.unit)
        return Source(self.name, self.view.file_shape(self.shape), view)


@dataclass(frozen=True, slots=True)
class Piece:
    """`box` of the logical source fills `local` of the parameter (same volume; `local` may have
    leading dims of size 1)."""

    source: Source
    box: Box
    local: Box


@dataclass(frozen=True)
class ParamLayout:
    """How one rank's parameter is made: `shape` is local, `cut` says along what it was cut."""

    name: str
    shape: Shape
    pieces: tuple[Piece, ...]
    cut: CutKind
    unit: str

    @cached_property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def num_padding(self) -> int:
        """Elements that no piece fills: zeros, never stored."""
        return self.num_elements - sum(volume(piece.box) for piece in self.pieces)

    def check(self) -> None:
        """Pieces lie inside their source and the parameter, and do not overlap."""
        for piece in self.pieces:
            for box, shape in ((piece.box, piece.source.shape), (piece.local, self.shape)):
                if intersect(box, full_box(shape)) != box:
                    raise ConfigError(f"{self.name}: box {box} leaves the shape {shape}")
            if volume(piece.box) != volume(piece.local):
                raise ConfigError(f"{self.name}: box {piece.box} does not fill {piece.local}")
        check_disjoint(self.name, [piece.local for piece in self.pieces])


def check_disjoint(name: str, boxes: list[Box]) -> None:
    """No two boxes overlap; sorted along the first dim, so that long lists stay cheap."""
    ordered = sorted(boxes)
    active: list[Box] = []
    for box in ordered:
        active = [other for other in active if not box or other[0][1] > box[0][0]]
        if any(intersect(box, other) for other in active):
            raise ConfigError(f"{name}: box {box} is filled twice")
        active.append(box)


# --- edges: where a dim is cut ------------------------------------------------------------------


@dataclass(frozen=True)
class HeadCut:
    """The attention heads of one rank: query heads [first, last), and the KV heads that they read.

    `head_map[i]` is the local KV head of local query head i.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    queries: tuple[int, int]

    @property
    def kv(self) -> tuple[int, int]:
        per_kv = self.num_heads // self.num_kv_heads
        return self.queries[0] // per_kv, -(-self.queries[1] // per_kv)

    @property
    def num_local_heads(self) -> int:
        return self.queries[1] - self.queries[0]

    @property
    def num_local_kv_heads(self) -> int:
        return self.kv[1] - self.kv[0]

    @property
    def num_shared(self) -> int | None:
        """Consecutive query heads that read each local KV head; None where they differ."""
        num = self.num_local_heads // self.num_local_kv_heads
        is_even = self.head_map == tuple(head // num for head in range(self.num_local_heads))
        return num if is_even else None

    @property
    def head_map(self) -> tuple[int, ...]:
        per_kv = self.num_heads // self.num_kv_heads
        return tuple(head // per_kv - self.kv[0] for head in range(*self.queries))


def _pack_heads(
    num_heads: int, per_kv: int, tp_size: int, max_kv: int, max_q: int
) -> list[int] | None:
    """Edges of `tp_size` runs of at most `max_q` query heads over at most `max_kv` KV heads."""
    edges = [0]
    for rank in range(tp_size):
        start = edges[-1]
        furthest = min(start + max_q, (start // per_kv + max_kv) * per_kv)
        edges.append(min(furthest, num_heads - (tp_size - rank - 1)))
    return edges if edges[-1] == num_heads else None


def head_edges(num_heads: int, num_kv_heads: int, tp_size: int) -> tuple[int, ...]:
    """Query-head edges that minimise the largest KV-head count, then the largest query-head count."""
    if tp_size > num_heads:
        raise ConfigError(
            f"tensor_parallel_size={tp_size} exceeds the {num_heads} query heads; use at most {num_heads}"
        )
    per_kv = num_heads // num_kv_heads
    for max_kv in range(1, num_kv_heads + 1):
        for max_q in range(-(-num_heads // tp_size), min(num_heads, max_kv * per_kv) + 1):
            edges = _pack_heads(num_heads, per_kv, tp_size, max_kv, max_q)
            if edges:
                return tuple(edges)
    raise AssertionError("one rank's share of all heads always fits")


def column_edges(size: int, tp_size: int) -> tuple[int, ...]:
    """Edges of `size` columns on multiples of the largest unit that keeps imbalance under 5%."""
    if tp_size > size:
        raise ConfigError(
            f"tensor_parallel_size={tp_size} exceeds the {size} MLP columns; use at most {size}"
        )
    for unit in MLP_UNITS:
        num_units = -(-size // unit)
        edges = tuple(
            min(size, unit * (num_units * rank // tp_size)) for rank in range(tp_size + 1)
        )
        widths = [stop - start for start, stop in pairwise(edges)]
        if max(widths) * tp_size / size - 1 < MAX_IMBALANCE and min(widths) > 0:
            return edges
    return edges  # unit 1: as even as whole columns can be


def vocabulary_width(vocab_size: int, tp_size: int) -> int:
    """The padded local number of vocabulary rows, the same on every rank."""
    return -(-vocab_size // (tp_size * VOCABULARY_UNIT)) * VOCABULARY_UNIT


def vocabulary_range(vocab_size: int, tp_size: int, tp_rank: int) -> tuple[int, int]:
    """The real vocabulary rows of one rank (empty on the last ranks of a small vocabulary)."""
    width = vocabulary_width(vocab_size, tp_size)
    start = min(vocab_size, tp_rank * width)
    return start, min(vocab_size, start + width)


# --- layouts of parameters ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows [start, stop) of a logical source: a segment of a column-parallel parameter."""

    source: Source
    start: int
    stop: int


def replicated(name: str, source: Source) -> ParamLayout:
    box = full_box(source.shape)
    return ParamLayout(name, source.shape, (Piece(source, box, box),), "replicated", "whole")


def column_layout(name: str, rows: list[Rows], unit: str) -> ParamLayout:
    """Segments of rows stacked along dim 0: weights [out, in] and biases [out]."""
    pieces, at = [], 0
    for segment in rows:
        rest = full_box(segment.source.shape[1:])
        num_rows = segment.stop - segment.start
        box, local = ((segment.start, segment.stop), *rest), ((at, at + num_rows), *rest)
        pieces.append(Piece(segment.source, box, local))
        at += num_rows
    shape = (at, *rows[0].source.shape[1:])
    return ParamLayout(name, shape, tuple(pieces), "column", unit)


def row_layout(name: str, source: Source, columns: tuple[int, int], unit: str) -> ParamLayout:
    """Columns [start, stop) of a weight [out, in]: the inputs that this rank computes."""
    out_features = source.shape[0]
    box = ((0, out_features), columns)
    local = ((0, out_features), (0, columns[1] - columns[0]))
    return ParamLayout(name, box_shape(box), (Piece(source, box, local),), "row", unit)


def vocabulary_layout(name: str, source: Source, tp_size: int, tp_rank: int) -> ParamLayout:
    """Equal padded numbers of vocabulary rows."""
    start, stop = vocabulary_range(source.shape[0], tp_size, tp_rank)
    rest = full_box(source.shape[1:])
    shape = (vocabulary_width(source.shape[0], tp_size), *source.shape[1:])
    pieces = (
        (Piece(source, ((start, stop), *rest), ((0, stop - start), *rest)),) if start < stop else ()
    )
    return ParamLayout(name, shape, pieces, "vocabulary", "vocabulary row")


def stack_experts(name: str, experts: list[ParamLayout]) -> ParamLayout:
    """One parameter [expert, ...] of layouts of equal shape, one an expert."""
    pieces = tuple(
        Piece(piece.source, piece.box, ((index, index + 1), *piece.local))
        for index, layout in enumerate(experts)
        for piece in layout.pieces
    )
    shape = (len(experts), *experts[0].shape)
    return ParamLayout(name, shape, pieces, experts[0].cut, experts[0].unit)


# --- the whole model ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KVSpec:
    """What one attention layer caches of a token on one rank (elements), and for how long."""

    elements_per_token: int
    window: int | None


@dataclass(frozen=True, slots=True)
class CacheKind:
    """Layers whose queries look back equally far share block tables: `window` tokens, or None for
    all of them. Block ids go from 0 to `num_blocks` - 1 on every rank."""

    window: int | None
    num_blocks: int


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a module holds while it runs, beside its input and its output.

    Elements for each token of a step; elements gathered for each place of a context; float32
    elements for each pair of a query and a place; bytes at most of a copy of what was gathered, where scores are
    not left to torch's attention.
    """

    token_elements: int = 0
    place_elements: int = 0
    score_elements: int = 0
    copied_bytes: int = 0

    def largest(self, other: StepWork) -> StepWork:
        """The work of a rank that runs one after the other."""
        return StepWork(
            max(self.token_elements, other.token_elements),
            max(self.place_elements, other.place_elements),
            max(self.score_elements, other.score_elements),
            max(self.copied_bytes, other.copied_bytes),
        )


@dataclass(frozen=True)
class RankLayout:
    """One rank's parameters: those of layers [first_layer, last_layer) and of the model's ends."""

    rank: int
    stage: int
    tp_rank: int
    layers: tuple[int, int]
    params: tuple[ParamLayout, ...]
    kv: tuple[KVSpec, ...]
    work: StepWork

    @property
    def num_elements(self) -> int:
        return sum(param.num_elements for param in self.params)

    def blocks(self) -> dict[str, list[tuple[Source, Box]]]:
        """The distinct boxes of each source that this rank holds, in order of use."""
        found: dict[str, dict[Box, Source]] = {}
        for param in self.params:
            for piece in param.pieces:
                found.setdefault(piece.source.name, {}).setdefault(piece.box, piece.source)
        return {
            name: [(source, box) for box, source in boxes.items()] for name, boxes in found.items()
        }


@dataclass(frozen=True)
class ModelLayout:
    """Which rank holds which pieces of which parameter, for one model and its widths."""

    widths: tuple[int, ...]
    ranks: tuple[RankLayout, ...]

    @cached_property
    def sources(self) -> dict[str, Source]:
        """Every checkpoint tensor that some rank reads."""
        return {
            piece.source.name: piece.source
            for rank in self.ranks
            for param in rank.params
            for piece in param.pieces
        }

    def check(self) -> None:
        """Every parameter is well formed and every logical element is held by some rank."""
        boxes: dict[str, set[Box]] = {}
        for rank in self.ranks:
            for param in rank.params:
                param.check()
                for piece in param.pieces:
                    boxes.setdefault(piece.source.name, set()).add(piece.box)
        for name, held in boxes.items():
            covered, whole = union_volume(held), math.prod(self.sources[name].shape)
            if covered != whole:
                raise ConfigError(f"{name}: ranks hold {covered} of {whole} elements")

    @cached_property
    def replicated_elements(self) -> dict[str, int]:
        """Elements held beyond the first copy, by source (norms, straddled KV heads, tied ends)."""
        held: dict[str, int] = {}
        for rank in self.ranks:
            for name, blocks in rank.blocks().items():
                held[name] = held.get(name, 0) + sum(volume(box) for _, box in blocks)
        extra = {name: count - math.prod(self.sources[name].shape) for name, count in held.items()}
        return {name: count for name, count in extra.items() if count}


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
