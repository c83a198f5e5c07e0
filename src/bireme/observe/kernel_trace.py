"""How much of its time a GPU ran kernels, from a Chrome trace of torch.profiler's."""

from __future__ import annotations

from pathlib import Path

import msgspec

from bireme.errors import UserError


class _Event(msgspec.Struct):
    cat: str = ""
    name: str = ""
    ts: float = 0.0  # microseconds
    dur: float = 0.0


class _Trace(msgspec.Struct):
    events: list[_Event] = msgspec.field(name="traceEvents")


def kernel_share(path: Path) -> float | None:
    """Of the time between its first and its last kernel, that of collectives left out; None where it ran
    none. UserError where the file is no such trace."""
    try:
        trace = msgspec.json.decode(path.read_bytes(), type=_Trace)
    except msgspec.MsgspecError as error:
        raise UserError(f"{path} is no trace of torch.profiler's: {error}; profile again") from None
    kernels = [it for it in trace.events if it.cat == "kernel"]
    if not kernels:
        return None
    whole = max(it.ts + it.dur for it in kernels) - min(it.ts for it in kernels)
    exchanging = _covered([it for it in kernels if it.name.startswith("nccl")])
    rest = whole - exchanging
    return (_covered(kernels) - exchanging) / rest if rest > 0 else None


def _covered(events: list[_Event]) -> float:
    """Of events that may lie beside each other, their time together."""
    total = at = 0.0
    for it in sorted(events, key=lambda event: event.ts):
        total += max(0.0, it.ts + it.dur - max(it.ts, at))
        at = max(at, it.ts + it.dur)
    return total
