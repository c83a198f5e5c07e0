"""A real (small) language model on four processes, with proof that it is the whole model.

Run by `scripts/demo`. Each step prints a command line, runs exactly that line through the
command's own entry point (in this process: importing torch once saves seconds) and checks its exit
status. All of it happens in a temporary folder.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TextIO

from bireme.cli import run

LIMITED = "--dtype float32 --memory-limit 24MiB --max-num-batched-tokens 256 --max-num-seqs 4"
ASK = f'bireme generate demo --chat "What does textwrap.dedent do?" {LIMITED}'
INDENT = "    "


class Indented(io.TextIOBase):
    """Passes text on as it comes, every line indented, and keeps it."""

    encoding, errors = "utf-8", "strict"  # typer asks for them before it writes

    def __init__(self, out: TextIO) -> None:
        self._out, self.text = out, ""

    def write(self, text: str) -> int:
        shown = re.sub(r"\n(?=[^\n])", "\n" + INDENT, text)
        is_line_start = not self.text or self.text.endswith("\n")
        self._out.write(INDENT + shown if is_line_start and text[:1] not in ("", "\n") else shown)
        self._out.flush()
        self.text += text
        return len(text)


def heading(number: int, text: str) -> None:
    print(f"\n[{number}] {text}", flush=True)


def run_line(line: str, status: int = 0) -> str:
    """Shows a command line, runs it and gives back what it printed; ends unless at `status`."""
    print(f"{INDENT}$ {line}", flush=True)
    out = Indented(sys.stdout)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        found = run(shlex.split(line)[1:])
    if found != status:
        sys.exit(f"`{line}` ended with status {found}, not {status}")
    return out.text


def flip_bit(path: Path, part_of_name: str) -> str:
    """Damages the middle of one tensor's bytes in a safetensors file; returns the tensor's key."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        key = next(key for key in header if part_of_name in key)
        middle = 8 + size + sum(header[key]["data_offsets"]) // 2
        file.seek(middle)
        (byte,) = file.read(1)
        file.seek(middle)
        file.write(bytes([byte ^ 1]))
    return key


def main() -> None:
    heading(1, "Too large for one rank under this memory limit")
    run_line(ASK, status=2)

    heading(2, "The same limit, on four ranks")
    run_line(f"{ASK} -tp 2 -pp 2")

    heading(3, "Proof that the four are the whole")
    run_line("bireme verify demo -tp 2 -pp 2 --dtype float32 --num-prompts 2 --num-decode 16")

    heading(4, "A sharded copy, damaged in one place, and the check that finds it")
    run_line("bireme shard demo shards -tp 2 -pp 2")
    damaged = Path("shards", "rank-00003-of-00004.safetensors")
    key = flip_bit(damaged, ".6.mlp.down_proj")
    print(f"{INDENT}(this program now flips one bit of {damaged})")
    if key not in run_line("bireme inspect shards --check", status=1):
        sys.exit(f"the check did not name {key}")

    print("\nTry next (the command is .venv/bin/bireme):")
    print(f'{INDENT}bireme generate demo --chat "What does os.path.join do?" -tp 3 --trace t.json')
    print(f"{INDENT}bireme inspect demo -tp 3,2")
    print(f"{INDENT}bireme verify demo -tp 8 --dtype float32")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="bireme-demo-") as folder, contextlib.chdir(folder):
        main()
