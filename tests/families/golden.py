"""The layout tables that are frozen under golden/, one small model for each way to cut.

`PYTHONPATH=src python tests/families/golden.py` writes them anew.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import zoo

from bireme.config import ParallelConfig
from bireme.hf_config import from_hf
from bireme.models.registry import model_layout
from bireme.parallel.layout import ParamLayout, Piece

FOLDER = Path(__file__).parent / "golden"
# file name: model, widths
TABLES = {
    "llama3-straddled-kv-heads-tied": ("llama3", (3, 2)),
    "phi3-fused-qkv-and-gate-up": ("phi3", (2,)),
    "gpt2-transposed": ("gpt2", (2, 1)),
    "bloom-interleaved-qkv": ("bloom", (2,)),
    "mixtral-stacked-experts": ("mixtral", (2,)),
    "opt-350m-projected-embedding": ("opt-350m", (2, 1)),
    "qwen2-padded-vocabulary": ("qwen2", (4,)),
}


def render(case: str, widths: tuple[int, ...]) -> str:
    """Rank by rank: a line for every parameter, and one for every piece of it."""
    config = from_hf(zoo.hf_config(zoo.CASES[case]))
    shallow = dataclasses.replace(config, num_layers=2, windows=config.windows[:2])
    layout = model_layout(shallow, ParallelConfig(widths=widths))
    lines = []
    for rank in layout.ranks:
        first, last = rank.layers
        lines.append(
            f"rank {rank.rank}: stage {rank.stage}, tp {rank.tp_rank}, layers {first} to {last - 1}"
        )
        for param in rank.params:
            lines += _param_lines(param)
        lines.append("")
    return "\n".join(lines)


def _param_lines(param: ParamLayout) -> list[str]:
    shape = " x ".join(map(str, param.shape))
    padding = f", {param.num_padding} elements of padding" if param.num_padding else ""
    head = f"  {param.name}: {param.cut} by {param.unit}, {shape}{padding}"
    return [head, *(f"    {_piece_text(piece)}" for piece in param.pieces)]


def _piece_text(piece: Piece) -> str:
    def text(box: tuple[tuple[int, int], ...]) -> str:
        return f"[{', '.join(f'{start}:{stop}' for start, stop in box)}]"

    view = "" if piece.source.view.kind == "identity" else f" ({piece.source.view})"
    return f"{text(piece.local)} = {piece.source.name}{view} {text(piece.box)}"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.txt"):
        path.unlink()
    for name, (case, widths) in TABLES.items():
        (FOLDER / f"{name}.txt").write_text(render(case, widths))
