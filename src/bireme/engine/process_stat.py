"""What the kernel says of a process of this host: proc(5)."""

from __future__ import annotations

from pathlib import Path

_STATE, _MAJOR_FAULTS = 0, 9  # of the fields behind the name


def is_stopped(pid: int) -> bool:
    """True while the process is held by SIGSTOP or a debugger."""
    fields = _fields(pid)
    return fields is not None and fields[_STATE] in ("T", "t")


def major_faults(pid: int) -> int | None:
    """Pages that it had to read from disk since it began; None where it is gone."""
    fields = _fields(pid)
    return None if fields is None else int(fields[_MAJOR_FAULTS])


def _fields(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()
