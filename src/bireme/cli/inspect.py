"""Show how a model is cut: parameters, pieces and bytes a rank. Needs only config.json."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from bireme.cli import options, progress
from bireme.cli.tables import console, table
from bireme.config import DTYPE_BYTES, EngineConfig, format_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from bireme.checkpoint.prepared import PreparedModel
    from bireme.parallel.layout import ModelLayout
    from bireme.parallel.memory import RankMemory
    from bireme.parallel.summary import ParamRow

NAME = "inspect"
SHORT = "Show how a model is cut; verify an artifact."


def run(
    model: options.Model,
    tp: options.TensorParallel = "1",
    pp: options.PipelineParallel = None,
    layers_per_stage: options.LayersPerStage = None,
    dtype: options.DTypeOption = "auto",
    max_model_len: options.MaxModelLen = None,
    check: Annotated[
        bool, typer.Option("--check", help="Verify every byte of a sharded artifact.")
    ] = False,
    as_json: options.JsonOutput = False,
) -> int:
    from bireme.checkpoint.hub import resolve_model
    from bireme.checkpoint.prepared import prepare_model
    from bireme.engine.budget import memory_of
    from bireme.engine.prepare import resolve_dtype
    from bireme.models.registry import model_layout

    if check:
        return _check(resolve_model(model, needs_weights=False))
    prepared = prepare_model(model, needs_weights=False)
    config = EngineConfig(
        parallel=options.parallel_config(tp, pp, layers_per_stage),
        **options.engine_config(dtype=dtype, max_model_len=max_model_len),
    )
    layout = model_layout(prepared.config, config.parallel)
    layout.check()
    kind = resolve_dtype(prepared.config, config)
    memory = memory_of(prepared.config, layout, config, kind)
    if as_json:
        typer.echo(json.dumps(_as_json(prepared, config, layout, memory, kind), indent=1))
    else:
        _print(prepared, config, layout, memory, kind)
    return 0


def _check(folder: Path) -> int:
    from bireme.checkpoint.artifact import Artifact

    artifact = Artifact(folder)
    total = sum(file.num_bytes for file in artifact.manifest.files)
    with progress.bytes_bar("checking", total, quiet=False) as advance:
        findings = artifact.check(advance)
    for finding in findings:
        typer.echo(finding)
    if not findings:
        typer.echo(
            f"{folder}: all {len(artifact.manifest.tensors)} tensors are as the manifest says ({format_bytes(total)})"
        )
    return 1 if findings else 0


def _print(
    model: PreparedModel,
    config: EngineConfig,
    layout: ModelLayout,
    memory: list[RankMemory],
    dtype: str,
) -> None:
    from bireme.engine.budget import resolve_max_model_len
    from bireme.parallel.summary import param_rows

    out = console()
    out.print(
        f"{model.name}: {model.config.architecture} at {config.parallel}, {dtype}", highlight=False
    )
    out.print(_param_table(param_rows(layout), DTYPE_BYTES[dtype]))
    out.print(_rank_table(layout, memory, resolve_max_model_len(model.config, config)))
    extra = layout.replicated_elements
    num_bytes = sum(extra.values()) * DTYPE_BYTES[dtype]
    out.print(
        f"replicated beyond the first copy: {format_bytes(num_bytes)} in {len(extra)} tensors",
        highlight=False,
    )


def _span(values: tuple[int, ...] | list[int]) -> str:
    low, high = format_bytes(min(values)), format_bytes(max(values))
    return low if low == high else f"{low} - {high}"


def _cut(row: ParamRow) -> str:
    """'query head (outputs)' where the rows of a weight [out, in] are cut, '(inputs)' for columns."""
    if row.cut == "replicated":
        return "whole on every rank"
    return (
        row.unit
        if row.cut == "vocabulary"
        else f"{row.unit} ({'outputs' if row.cut == 'column' else 'inputs'})"
    )


def _param_table(rows: list[ParamRow], item_bytes: int) -> Table:
    found = table()
    for name in ("parameter", "stage", "cut by", "local shape"):
        found.add_column(name, overflow="fold", min_width=len(name) + 1)
    for name in ("layers", "pieces", "bytes/rank", "padding", "imbalance"):
        found.add_column(name, justify="right", min_width=max(5, len(name) - 2))
    for row in rows:
        first, last = max(row.shapes), min(row.shapes)
        shape = "x".join(map(str, first)) + (
            "" if first == last else f" - {'x'.join(map(str, last))}"
        )
        found.add_row(
            re.sub(r"^(model|transformer|gpt_neox)\.", "", row.name).removesuffix(".weight"),
            row.stages,
            _cut(row),
            shape,
            str(row.num_layers),
            str(row.num_pieces),
            _span([count * item_bytes for count in row.elements]),
            _span([count * item_bytes for count in row.padding]) if any(row.padding) else "",
            f"{row.imbalance:.1%}" if row.imbalance > 0 else "",
        )
    return found


def _rank_table(layout: ModelLayout, memory: list[RankMemory], max_len: int) -> Table:
    rows = table(
        "rank", "stage", "tp", "layers", "weights", "cache/token", f"cache of {max_len} tokens",
        "activations", "total",
    )  # fmt: skip
    for rank, need in zip(layout.ranks, memory, strict=True):
        rows.add_row(
            str(rank.rank),
            str(rank.stage),
            str(rank.tp_rank),
            f"{rank.layers[0]}-{rank.layers[1] - 1}",
            format_bytes(need.weight_bytes),
            format_bytes(need.cache_bytes_per_token),
            format_bytes(need.cache_bytes_per_token * max_len),
            format_bytes(need.activation_bytes),
            format_bytes(need.total(max_len)),
        )
    return rows


def _as_json(
    model: PreparedModel,
    config: EngineConfig,
    layout: ModelLayout,
    memory: list[RankMemory],
    dtype: str,
) -> dict[str, Any]:
    from bireme.parallel.summary import param_rows

    return {
        "model": model.name,
        "architecture": model.config.architecture,
        "widths": layout.widths,
        "dtype": dtype,
        "parameters": [asdict(row) | {"imbalance": row.imbalance} for row in param_rows(layout)],
        "ranks": [
            {"stage": rank.stage, "tp_rank": rank.tp_rank, "layers": rank.layers} | asdict(need)
            for rank, need in zip(layout.ranks, memory, strict=True)
        ],
        "replicated_elements": layout.replicated_elements,
    }
