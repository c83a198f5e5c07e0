"""Every fenced command of the docs runs, and what is shown below it is what it prints.

A block after a comment `<!-- needs: ... -->` is left out. Numbers may differ (times, hashes), words
may not: every line that is shown must be among the lines that were printed, digits aside.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(
    r"(?P<needs><!-- needs: [^\n]*-->\n+)?^```(?P<kind>\w+)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    kind: str
    body: str
    is_left_out: bool


def blocks(text: str) -> list[Block]:
    return [Block(m["kind"], m["body"], m["needs"] is not None) for m in _BLOCK.finditer(text)]


def words(line: str) -> str:
    """A line without its digits, hashes, rules and spacing."""
    line = re.sub(r"\b[0-9a-f]{16}\b", "#", line)
    return re.sub(r"\s+", " ", re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "#", line)).strip()


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode in (0, 2), done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def check_shown(shown: str, printed: str) -> None:
    there = {words(line) for line in printed.splitlines()}
    missing = [line for line in shown.splitlines() if words(line) and words(line) not in there]
    assert not missing, f"shown but not printed: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run_and_print_what_is_shown(page: Path, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    printed = ""
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.is_left_out:
            printed = ""
        elif block.kind == "bash":
            printed = "".join(
                run(["bash", "-c", line], tmp_path)
                for line in block.body.splitlines()
                if line.strip()
            )
        elif block.kind == "python":
            printed = run([sys.executable, "-c", block.body], tmp_path)
        elif block.kind == "text" and printed:
            check_shown(block.body, printed)


def test_the_readme_shows_what_the_demo_prints() -> None:
    shown = next(
        block.body for block in blocks((ROOT / "README.md").read_text()) if block.kind == "text"
    )
    check_shown(shown, run([sys.executable, str(ROOT / "examples" / "demo.py")], ROOT))


@pytest.mark.parametrize("name", ["generate.py", "chat.py", "read_a_layout.py"])
def test_examples_run(name: str, tmp_path: Path) -> None:
    assert run([sys.executable, str(ROOT / "examples" / name)], tmp_path)


def test_made_up_checkpoints_are_ordinary_ones(tmp_path: Path) -> None:
    config = (ROOT / "src/bireme/assets/demo/config.json").read_text()
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text(config)
    make = str(ROOT / "examples" / "make_checkpoint.py")
    run([sys.executable, make, str(tmp_path / "shape"), str(tmp_path / "made")], tmp_path)
    out = run(
        [sys.executable, "-m", "bireme", "shard", str(tmp_path / "made"), str(tmp_path / "out")],
        tmp_path,
    )
    assert "1 ranks at tp 1 x pp 1" in out


def test_the_check_sees_a_line_that_was_not_printed() -> None:
    check_shown("took 3.5 s", "first\ntook 77 s\n")
    with pytest.raises(AssertionError, match="shown but not printed"):
        check_shown("took 3.5 minutes", "took 77 s\n")
