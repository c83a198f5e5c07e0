"""Names the first layer and rank that computed something else than the whole model did.

Both sides kept what every layer of every rank computed (`engine/capture.py`). A rank's result is
compared with the part of the whole's that its layout says it should be.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bireme.checkpoint.reader import TensorSource, bits_dtype
from bireme.engine.executor import WorkerPlan
from bireme.parallel.boxes import box_shape, full_box
from bireme.parallel.cuts import vocabulary_range
from bireme.parallel.layout import ModelLayout, ParamLayout, Source
from bireme.verify.certificate import Departure, Tolerance

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FILE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_capture(path: Path) -> dict[str, torch.Tensor]:
    """In the order in which it was computed."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        order = json.loads(file.metadata()["order"])
    return {key: tensors[key] for key in order}


class Localiser:
    """Compares a rank's results with the whole model's, each with the part that it should be."""

    def __init__(
        self,
        source: TensorSource,
        plan: WorkerPlan,
        whole: ModelLayout,
        cut: ModelLayout,
        tolerance: Tolerance,
    ) -> None:
        self._source, self._plan, self._cut, self._tolerance = source, plan, cut, tolerance
        self._whole = {param.name: param for param in whole.ranks[0].params}
        self.found: list[tuple[int, int, Departure]] = []

    def add(
        self,
        step: int,
        rank: int,
        reference: dict[str, torch.Tensor],
        local: dict[str, torch.Tensor],
        ids: torch.Tensor,
    ) -> None:
        """Notes the first key at which `rank` departs, if any."""
        params = {param.name: param for param in self._cut.ranks[rank].params}
        for position, key in enumerate(reference):
            if key not in local or key == "logits":
                continue
            expected = self._expected(key, reference, params, rank, ids)
            # a norm over heads (q_norm) is whole on every rank, its results are of local heads
            if expected is None or expected.shape != local[key].shape:
                continue
            # a sum of partial results rounds at the scale of its largest addend
            scale = max(float(expected.std()), float(local[key].std()), 1e-6)
            difference = (expected - local[key]).abs() / scale
            off, mean = float(difference.max()), float(difference.mean())
            if not (off <= 10 * self._tolerance.largest and mean <= 10 * self._tolerance.mean):
                self.found.append((position, rank, self._departure(step, rank, key, off)))
                return

    def _departure(self, step: int, rank: int, key: str, off: float) -> Departure:
        name, _, what = key.partition(":")
        digits = [part for part in name.split(".") if part.isdigit()]
        said = {"out": "result of", "in": "input of", "partial": "addend of", "": "result of"}[what]
        return Departure(step, int(digits[0]) if digits else None, rank, f"{said} {name}", off)

    def _expected(
        self,
        key: str,
        reference: dict[str, torch.Tensor],
        params: dict[str, ParamLayout],
        rank: int,
        ids: torch.Tensor,
    ) -> torch.Tensor | None:
        """What the rank should have computed; None where the whole cannot say."""
        name, _, what = key.partition(":")
        layout = params.get(name)
        if layout is None or layout.cut == "replicated":
            return reference[key]
        if len(layout.shape) == 3:
            return reference[key] if what == "out" else None
        if layout.cut == "column":
            return reference[key][:, self._rows(layout)]
        if what == "out":
            return reference[key]
        if layout.cut == "vocabulary":
            width = self._plan.config.parallel.widths[self._cut.ranks[rank].stage]
            vocab = self._plan.model.vocab_size
            first, last = vocabulary_range(vocab, width, self._cut.ranks[rank].tp_rank)
            return reference[f"{name}:out"] * ((ids >= first) & (ids < last)).unsqueeze(-1)
        columns = slice(*layout.pieces[0].box[1])
        addend = reference[f"{name}:in"][:, columns]
        return addend if what == "in" else addend @ self._weight(layout)[:, columns].T

    def _rows(self, layout: ParamLayout) -> torch.Tensor:
        """Where the local rows lie in the whole model's parameter."""
        rows = []
        for piece in layout.pieces:
            home = next(
                other
                for other in self._whole[layout.name].pieces
                if other.source.name == piece.source.name
                and other.box[0][0] <= piece.box[0][0]
                and piece.box[0][1] <= other.box[0][1]
            )
            shift = home.local[0][0] - home.box[0][0]
            rows.append(torch.arange(piece.box[0][0] + shift, piece.box[0][1] + shift))
        return torch.cat(rows)

    def _weight(self, layout: ParamLayout) -> torch.Tensor:
        source: Source = self._plan.names.source(layout.pieces[0].source)
        dtype = self._source.tensors[source.name].dtype
        bits: NDArray[Any] = np.empty(box_shape(full_box(source.shape)), dtype=bits_dtype(dtype))
        self._source.read(source, full_box(source.shape), bits)
        whole = torch.from_numpy(bits).view(_FILE_DTYPES[dtype])
        return whole.to(getattr(torch, self._plan.dtype)).float()
