"""The tables of the READMEs that tell of GPUs, from the results that are kept: what was measured, what was aimed at
(`aims.json`), what vLLM takes, and where the time of the cells goes that miss their aims.

    python benchmarks/readme_tables.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
SHAPE, LARGE_SHAPE = "decode-llama-2-7b-2x-h200", "decode-llama-3-70b-2x-h200"
OTHER_SHAPE = "decode-heads-of-64-2x-h200"
LATER_SHAPE = "decode-heads-of-256-1x-h200"
KERNELS = "step-kernels-llama-2-7b-2x-h200"
ATTENTION = "attention-1x-h200"
Layout = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A figure that was measured and what was aimed at. `beside` it stands the share that the hardware's floor has of
    it, or of a start the one without a kernel cache. `part` and `size` name it among results: decode, prefill.
    `digits` behind the point; `is_rate`: more is better."""

    name: str
    part: str
    size: str
    found: float
    beside: str
    aim: float
    digits: int
    is_rate: bool = False

    @property
    def missed(self) -> float:
        """By how much of the aim; 0 where it is reached."""
        behind = self.aim - self.found if self.is_rate else self.found - self.aim
        return max(0.0, behind / self.aim)

    def __str__(self) -> str:
        beside = f" ({self.beside})" if self.beside else ""
        return f"{self.found:,.{self.digits}f}{beside}"


def kept(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text())
    return found


def cells(name: str) -> dict[str, list[Cell]]:
    """By layout, "tp,pp"."""
    aims = json.loads((HERE / "aims.json").read_text())[name]
    by_layout = {f"{it['tp']},{it['pp']}": it for it in kept(name)["layouts"]}
    return {layout: list(_cells(it, aims[layout])) for layout, it in by_layout.items()}


def _cells(found: Layout, aims: dict[str, Any]) -> Iterator[Cell]:
    for batch, aim in aims["decode"].items():
        one = found["decode"][batch]
        share = f"{one['floor_s'] / one['step_s']:.0%}"
        name = f"decode, batch {batch}, ms a step"
        yield Cell(name, "decode", batch, 1e3 * one["step_s"], share, aim, 2)
    for size, aim in aims["prefill"].items():
        one = found["prefill"][size]
        took = median(one["ttft_s"])
        share = f"{one['floor_s'] / took:.0%}"
        yield Cell(f"prefill 1 x {size}, ms", "prefill", size, 1e3 * took, share, aim, 1)
    if "throughput" in aims:
        load = found["throughput"]
        rate = median(load["output_tokens_per_second_by_round"])
        floor = load["num_prompts"] * load["output_len"] / load["floor_s"]
        share, aim = f"{rate / floor:.0%}", aims["throughput"]
        yield Cell(
            "throughput, output tokens/s", "throughput", "", rate, share, aim, 0, is_rate=True
        )
    name, beside = "start to first token, s", ""
    if "start_with_empty_cache_s" in found:
        name += " (without a cache)"
        beside = f"{found['start_with_empty_cache_s']:.1f}"
    yield Cell(name, "start", "", median(found["start_s"]), beside, aims["start"], 1)


def _lines(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _layout_name(layout: str) -> str:
    tp, pp = layout.split(",")
    return f"tp {tp} x pp {pp}"


def beside_aims(name: str, word: str = "aim") -> list[str]:
    """In Markdown; figures that miss their aims, or what that `word` calls them, are in bold."""
    columns = cells(name)
    header = ["", *(head for layout in columns for head in (_layout_name(layout), word))]
    rows = []
    for line in zip(*columns.values(), strict=True):
        told = [(f"**{cell}**" if cell.missed else str(cell), f"{cell.aim:,}") for cell in line]
        rows.append([line[0].name, *(part for both in told for part in both)])
    return _lines(header, rows)


def shares(name: str) -> list[str]:
    """In Markdown: medians by our own clock, with the shares that the hardware's floors are of them; of steps their
    10th and 90th percentiles."""
    layouts = kept(name)["layouts"]

    def step(one: Layout) -> str:
        took, first, last = (1e3 * one[key] for key in ("step_s", "p10_s", "p90_s"))
        return f"{took:.2f} ({1e3 * one['floor_s'] / took:.0%}; {first:.2f} to {last:.2f})"

    def prompt(one: Layout) -> str:
        took = median(one["ttft_s"])
        return f"{1e3 * took:.1f} ({one['floor_s'] / took:.0%})"

    rows = [
        [f"decode, batch {batch}, ms a step", *(step(it["decode"][batch]) for it in layouts)]
        for batch in layouts[0]["decode"]
    ]
    rows += [
        [f"prefill 1 x {size}, ms", *(prompt(it["prefill"][size]) for it in layouts)]
        for size in layouts[0]["prefill"]
    ]
    rows.append(["start to first token, s", *(f"{median(it['start_s']):.1f}" for it in layouts)])
    return _lines(["", *(_layout_name(f"{it['tp']},{it['pp']}") for it in layouts)], rows)


def beside_vllm(name: str) -> list[str]:
    """In Markdown: ours and vLLM's, timed from outside in the same way; medians, and the least to the most."""
    layouts = kept(name)["layouts"]
    names = [_layout_name(f"{it['tp']},{it['pp']}") for it in layouts]
    told = [it["peers"][peer] for it in layouts for peer in ("bireme", "vllm")]

    def row(title: str, figure: Callable[[Layout], str]) -> list[str]:
        return [title, *(figure(one) for one in told)]

    def step(batch: str) -> Callable[[Layout], str]:
        return lambda one: _spread([1e3 * took for took in one["step_s"][batch]], ".2f")

    def prompt(size: str) -> Callable[[Layout], str]:
        return lambda one: _spread([1e3 * took for took in one["first_token_s"][size]], ".1f")

    rows = [row(f"batch {batch}, ms a step", step(batch)) for batch in told[0]["step_s"]]
    rows += [row(f"prompt of {size}, ms", prompt(size)) for size in told[0]["first_token_s"]]
    if all("output_tokens_per_s" in one for one in told):
        rate = row("output tokens/s", lambda one: _spread(one["output_tokens_per_s"], ",.0f"))
        rows.append(rate)
    rows.append(row("constructor, s", lambda one: f"{one['start_s']:.1f}"))
    return _lines(["", *(head for one in names for head in (one, "vLLM"))], rows)


def _spread(figures: Sequence[float], digits: str) -> str:
    middle, least, most = (
        format(one, digits) for one in (median(figures), min(figures), max(figures))
    )
    return f"{middle} ({least} to {most})"


def missing(name: str, seen: Mapping[str, Layout]) -> list[str]:
    """In Markdown: of each cell that misses its aim, by how much, and the milliseconds of its kinds of kernels as the
    profiler saw them on the first rank (`step_kernels_gpu.py`, by layout), in brackets their floor. Throughput and
    starts have no such kinds."""
    rows, kinds = [], _kinds(seen)
    for layout, of_layout in cells(name).items():
        for cell in of_layout:
            if cell.missed:
                title = f"{_layout_name(layout)}: {cell.name.removesuffix(', ms a step')}"
                said = [title, f"{cell} of {cell.aim:,}", f"{cell.missed:.1%}"]
                one = seen[layout].get(cell.part, {}).get(cell.size)
                rows.append([*said, *(told_by_kind(one, kinds) if one else [""] * len(kinds))])
    return _lines(["", "of its aim", "missed by", *kinds], rows)


def _kinds(seen: Mapping[str, Layout]) -> list[str]:
    one: Layout = next(iter(next(iter(seen.values()))["decode"].values()))
    return list(one["ranks"][0])


def told_by_kind(one: Layout, kinds: Sequence[str]) -> list[str]:
    """Of a cell's kernels on the first rank, as `step_kernels_gpu.py` keeps them."""
    told = {kind: f"{one['ranks'][0][kind]:.2f}" for kind in kinds}
    for kind, floor_ms in one["floor_ms"].items():
        told[kind] += f" ({floor_ms:.2f})"
    return list(told.values())


def attention(name: str) -> list[list[str]]:
    """In Markdown: microseconds, and the share that the floor is of them, of a rank's heads and blocks of the cache of
    so many tokens (`attention_gpu.py`); a table for those of which the same was measured."""
    columns: dict[str, dict[str, str]] = {}
    for one in kept(name)["shapes"]:
        column = columns.setdefault(f"{one['heads']}, {one['block_size']}", {})
        column[_attended(one)] = f"{one['us']:.1f} ({one['floor_us'] / one['us']:.0%})"
    tables: dict[tuple[str, ...], list[str]] = {}
    for heads, column in columns.items():
        tables.setdefault(tuple(column), []).append(heads)
    return [
        _lines(["", *of], [[title, *(columns[heads][title] for heads in of)] for title in titles])
        for titles, of in tables.items()
    ]


def _attended(shape: Layout) -> str:
    before = shape["before"]
    if shape["num_tokens"] > 1:
        behind = f" behind {before:,}" if before else ""
        return f"a prompt's {shape['num_tokens']:,} tokens{behind}"
    if shape["longest"]:
        return (
            f"{shape['num_seqs'] - 1} contexts of {before + 1:,}, one of {shape['longest'] + 1:,}"
        )
    kind = "context" if shape["num_seqs"] == 1 else "contexts"
    return f"{shape['num_seqs']} {kind} of {before + 1:,}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n\n")[0]).parse_args()
    tables = [beside_aims(SHAPE), beside_aims(LARGE_SHAPE, "limit")]
    tables += [shares(OTHER_SHAPE)]
    tables += [beside_vllm(name) for name in (SHAPE, LARGE_SHAPE, OTHER_SHAPE, LATER_SHAPE)]
    if (HERE / "results" / f"{KERNELS}.json").exists():
        layouts = kept(KERNELS)["layouts"]
        tables.append(missing(SHAPE, {f"{it['tp']},{it['pp']}": it for it in layouts}))
    tables += attention(ATTENTION)
    print("\n\n".join("\n".join(table) for table in tables))


if __name__ == "__main__":
    main()
