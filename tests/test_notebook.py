"""The notebook of examples/: its cells run in order in one fresh Python process, without Jupyter, what they find is
as it says, and the outputs kept in it are of these cells and of no machine in particular."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bireme.observe.causes import Row

NOTEBOOK = Path(__file__).parent.parent / "examples" / "plan-run-ledger.ipynb"
MARK = "--- next cell ---"
CHECKS = """
from xml.etree import ElementTree

for ledger in (predicted, measured, one, three):
    assert len(ledger.ranks) == 2
    assert all(sum(rank.ns.values()) == rank.wall_ns for rank in ledger.ranks)

assert [trial.num_micro_batches for trial in staged.trials] == list(COUNTS)
for it in staged.trials:
    found, of_schedule = fmean(it.passed.bubbles), fmean(it.passed.predicted_bubbles)
    assert of_schedule - 1e-6 <= found, "a run cannot be better than its schedule"
    of_plan = fmean(prediction_of(plan, SIZE, it.num_micro_batches).bubbles)
    assert of_plan >= textbook_bubble(2, it.num_micro_batches) - 1e-3
assert abs(fmean(trial.passed.bubbles) - fmean(trial.passed.predicted_bubbles)) < 0.3

waits = [fmean(rank.share(Row.TOKEN_DEPENDENCY) for rank in it.ranks) for it in (one, three)]
assert waits[0] > waits[1], waits
assert all(rank.ns[Row.TOKEN_DEPENDENCY] == 0 for rank in (*predicted.ranks, *measured.ranks))

for picture in (bars_beside({"a & b": predicted, "c": measured}), bars_beside({"d": one}, 12)):
    ElementTree.fromstring(picture._repr_svg_())
"""


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def printed(cell: dict[str, Any]) -> str:
    return "".join("".join(it["text"]) for it in cell["outputs"] if it["output_type"] == "stream")


def settled(text: str) -> list[str]:
    """Its lines without numbers, spaces, and rows of ledgers, of which those that all ranks lack are left out."""
    rows = {row.replace("_", " ") for row in Row}
    lines = [re.sub(r"[\d. ]+", " ", line).strip() for line in text.splitlines()]
    return [line for line in lines if line not in rows]


@pytest.mark.slow
def test_cells_run_and_print_what_is_kept(cells: list[dict[str, Any]], tmp_path: Path) -> None:
    script = f"\nprint({MARK!r})\n".join(["".join(cell["source"]) for cell in cells] + [CHECKS])
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *parts, of_checks = done.stdout.split(f"{MARK}\n")
    assert of_checks == ""
    for cell, part in zip(cells, parts, strict=True):
        # where the cut falls and what a model says of a prompt may be another machine's
        assert settled(printed(cell))[:1] == settled(part)[:1], cell["id"]
        assert len(settled(printed(cell))) == len(settled(part)), cell["id"]


def test_outputs_are_kept_of_one_run_in_order(cells: list[dict[str, Any]]) -> None:
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [it["output_type"] for cell in cells for it in cell["outputs"]]
    assert "error" not in kinds
    pictures = [it["data"] for cell in cells for it in cell["outputs"] if "data" in it]
    assert len(pictures) == 2
    assert all("image/svg+xml" in it for it in pictures)


def test_outputs_tell_of_no_machine() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    outputs = json.dumps([it.get("outputs") for it in json.loads(text)["cells"]])
    assert not re.search(r"/(home|work|tmp|root|usr|Users)\b|\.py\b|stderr", outputs)
    assert socket.gethostname() not in text


def test_cells_are_short(cells: list[dict[str, Any]]) -> None:
    assert all(len(cell["source"]) <= 20 for cell in cells)
