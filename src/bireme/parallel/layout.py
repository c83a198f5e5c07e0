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
from typing import Literal

from bireme.errors import ConfigError
from bireme.parallel.boxes import (
    Box,
    Shape,
    box_shape,
    check_disjoint,
    full_box,
    intersect,
    relative,
    union_volume,
    volume,
)
from bireme.parallel.cuts import vocabulary_range, vocabulary_width

CutKind = Literal["column", "row", "vocabulary", "replicated"]


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
