"""The fenced commands of the docs, and what is shown below them.

A block after a comment `<!-- needs: ... -->` is left out; one after `<!-- server: bireme serve ... -->`
runs beside that server, which is on another port than it says. Every line that is shown must be among
the lines that were printed. Numbers count too, except those that no two runs share: times, rates, and
differences of logits that rounding makes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# what its commands find says where time goes
OF_DELAYS = ROOT / "docs" / "guide" / "debugging-a-slow-engine.md"
_BLOCK = re.compile(
    r"(?P<needs><!-- needs: [^\n]*-->\n+)?(<!-- server: (?P<server>[^\n]*) -->\n+)?"
    r"^```(?P<kind>\w+)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    kind: str
    body: str
    is_left_out: bool
    server: str | None = None


def blocks(text: str) -> list[Block]:
    return [
        Block(m["kind"], m["body"], m["needs"] is not None, m["server"])
        for m in _BLOCK.finditer(text)
    ]


_VOLATILE = re.compile(
    r"\d+(\.\d+)?(?= (s|ms|tokens/s|requests/s)\b|% of the time)"  # times and rates
    r"|\d\.\d+e-\d+"  # 1.24e-05: what rounding makes of a logit
    r"|^\d+(?=\. .* \([a-z-]+\)$)"  # a finding's rank: what a busy machine has done comes in between
)


def settled(line: str) -> str:
    """A line without its volatile numbers and its spacing."""
    return " ".join(_VOLATILE.sub("#", line).split())


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


_PORT = "8000"


class Servers:
    """Those that a page needs, each started once; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[str, tuple[subprocess.Popen[str], str]] = {}

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        for process, _ in self._running.values():
            process.terminate()
        for process, _ in self._running.values():
            process.communicate(timeout=60)

    def port_of(self, command: str) -> str:
        if command not in self._running:
            self._running[command] = self._start(command)
        return self._running[command][1]

    def _start(self, command: str) -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen(
            f"exec env {command} --port 0 --no-log-requests",
            shell=True,
            cwd=self._folder,
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"serving \S+ at https?://[^:]+:(\d+)/", line):
                return process, found[1]
        raise AssertionError(f"{command} does not start")


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    allowed = (0, 1) if "bireme doctor" in command[-1] else (0, 2)  # 1: it found something
    assert done.returncode in allowed, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def check_shown(shown: str, printed: str) -> None:
    there = {settled(line) for line in printed.splitlines()}
    missing = [line for line in shown.splitlines() if line.strip() and settled(line) not in there]
    assert not missing, f"shown but not printed: {missing}"


def check_page(page: Path, folder: Path) -> None:
    """Every command runs, in this folder, and prints what is shown."""
    (folder / "examples").symlink_to(ROOT / "examples")
    printed = ""
    with Servers(folder) as servers:
        for block in blocks(page.read_text(encoding="utf-8")):
            body = block.body
            if block.server is not None:
                body = body.replace(_PORT, servers.port_of(block.server))
            if block.is_left_out:
                printed = ""
            elif block.kind == "bash":
                printed = "\n".join(
                    run(["bash", "-c", line], folder) for line in body.splitlines() if line.strip()
                )
            elif block.kind == "python":
                printed = run([sys.executable, "-c", body], folder)
            elif block.kind in ("text", "json") and printed:
                check_shown(body, printed)
