"""What a command says beside its result: lines on standard error."""

from __future__ import annotations

import sys


def note(text: str) -> None:
    print(f"bireme: {text}", file=sys.stderr)


def note_if_busy() -> None:
    """Before figures are taken."""
    from bireme.engine.setup import num_cores
    from bireme.planning.probe import hardware

    if (load := hardware.load_average()) > (cores := num_cores()):
        note(f"the machine is busy (load average {load:.1f} on {cores} cores): figures will be low")
