"""Where a GPU's time went by its kernels, from a Chrome trace of torch.profiler's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from bireme.errors import UserError

# how names begin of kernels in which ranks wait for one another
_SUMS = ("nccl", "peer_sum", "sharded_sum")
# parts of names: what NCCL's between stages are called, and torch's of flags
_MESSAGES = ("SendRecv", "wait_signal", "put_signal")
_PAUSE_US = 10.0  # a shorter one is between kernels that follow one another


class _Arguments(msgspec.Struct):
    correlation: int = 0


class _Event(msgspec.Struct):
    cat: str = ""
    name: str = ""
    ts: float = 0.0  # microseconds
    dur: float = 0.0
    args: msgspec.Raw = msgspec.Raw(b"{}")


class _Trace(msgspec.Struct):
    events: list[_Event] = msgspec.field(name="traceEvents")


def is_message(name: str) -> bool:
    """Whether a kernel of this name is of what stages send to one another."""
    return any(part in name for part in _MESSAGES)


def is_exchange(name: str) -> bool:
    """Whether ranks wait for one another in a kernel of this name."""
    return name.lower().startswith(_SUMS) or is_message(name)


class Kernel(NamedTuple):
    """In microseconds: where it began, how long no kernel ran before, and what it ran that no earlier one did.
    `launch`: the same number for all kernels of a graph's replay; `goes_on` of those but the first."""

    name: str
    launch: int
    begin_us: float
    gap_us: float
    own_us: float
    goes_on: bool

    @property
    def is_exchange(self) -> bool:
        return is_exchange(self.name)

    @property
    def is_message(self) -> bool:
        return is_message(self.name)

    @property
    def follows_pause(self) -> bool:
        """And was not launched together with what ran before."""
        return self.gap_us >= _PAUSE_US and not self.goes_on


@dataclass(frozen=True)
class KernelTimes:
    """Of a GPU, from its first kernel to the end of the last, in seconds: in kernels in which ranks of a tensor group
    wait for one another, in those in which stages do, in others, where two run together in that which began first; and
    in none, between kernels that follow one another or were launched together, and otherwise; of both of these the
    longest too."""

    whole_s: float
    collective_s: float
    message_s: float
    other_s: float
    between_s: float
    pause_s: float
    longest_between_s: float
    longest_pause_s: float


def kernels(path: Path) -> list[Kernel]:
    """In the order in which they began. UserError where the file is no such trace."""
    try:
        trace = msgspec.json.decode(path.read_bytes(), type=_Trace)
    except msgspec.MsgspecError as error:
        raise UserError(f"{path} is no trace of torch.profiler's: {error}; profile again") from None
    events = sorted((it for it in trace.events if it.cat == "kernel"), key=lambda it: it.ts)
    found: list[Kernel] = []
    at, before = events[0].ts if events else 0.0, 0
    for it in events:
        # a kernel may be launched while the one before still runs, and only wait: that is the other's time
        own = max(0.0, it.ts + it.dur - max(it.ts, at))
        launch = msgspec.json.decode(it.args, type=_Arguments).correlation
        goes_on = launch == before != 0
        found.append(Kernel(it.name, launch, it.ts, max(0.0, it.ts - at), own, goes_on))
        at, before = max(at, it.ts + it.dur), launch
    return found


def kernel_times(path: Path) -> KernelTimes | None:
    """None where there is no kernel. UserError where the file is no such trace."""
    found = kernels(path)
    if not found:
        return None
    message = sum(it.own_us for it in found if it.is_message)
    exchange = sum(it.own_us for it in found if it.is_exchange)
    other = sum(it.own_us for it in found if not it.is_exchange)
    gaps = [it.gap_us for it in found if not it.follows_pause]
    pauses = [it.gap_us for it in found if it.follows_pause]
    between, pause = sum(gaps), sum(pauses)
    whole = exchange + other + between + pause
    times = (
        whole,
        exchange - message,
        message,
        other,
        between,
        pause,
        max(gaps, default=0.0),
        max(pauses, default=0.0),
    )
    return KernelTimes(*(microseconds / 1e6 for microseconds in times))


def kernel_share(path: Path) -> float | None:
    """Of the time between its first and its last kernel, that of collectives left out; None where it ran none."""
    found = kernel_times(path)
    rest_s = 0.0 if found is None else found.whole_s - found.collective_s - found.message_s
    return None if found is None or rest_s <= 0 else found.other_s / rest_s
