"""When kernels began and ended, told by themselves: an event beside one would keep it from being chained.

Times are nanoseconds of the device's own clock.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bireme.kernels.gpu.chain import await_before, chained

_PAUSE_NS = 30_000  # as long as the host takes to record an event, or longer
_LONG_PAUSE_NS = 5_000_000  # and to launch some tens of kernels


@triton.jit
def begun_at(IS_STAMPED: tl.constexpr):
    """What a kernel calls when all before it are over."""
    begun = tl.full([], 0, tl.int64)
    if IS_STAMPED:
        begun = tl.extra.cuda.globaltimer()
    return begun


@triton.jit
def stamp(stamps, begun, IS_STAMPED: tl.constexpr):
    """What every program calls last, into int64 [2]: when the first had begun, and all have ended."""
    if IS_STAMPED:
        if tl.program_id(0) == 0:
            tl.store(stamps, begun)
        tl.debug_barrier()
        tl.atomic_max(stamps + 1, tl.extra.cuda.globaltimer(), sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=["place"])
def _note_kernel(place):
    tl.store(place, tl.extra.cuda.globaltimer())


@triton.jit
def _note_next_kernel(places, count, NUM: tl.constexpr):
    number = tl.load(count)
    tl.store(places + number % NUM, tl.extra.cuda.globaltimer())
    tl.store(count, number + 1)


@triton.jit
def _look_kernel(place, pause_ns):
    begun = tl.extra.cuda.globaltimer()
    now = begun
    while now - begun < pause_ns:
        now = tl.extra.cuda.globaltimer()
    tl.store(place, now)


def note_time(place: torch.Tensor) -> None:
    """Into the first of int64 [N], when the stream comes to it."""
    _note_kernel[(1,)](place, num_warps=1)


def note_time_next(places: torch.Tensor, count: torch.Tensor) -> None:
    """Into int64 [N], which may be pinned memory of the host, one place after another: `count`, int64 [1] on the
    device, is how many times were noted."""
    _note_next_kernel[(1,)](places, count, NUM=len(places), num_warps=1)


@triton.jit
def _empty_kernel(stamps, IS_CHAINED: tl.constexpr):
    await_before(IS_CHAINED)
    stamp(stamps, begun_at(True), True)


def between_kernels_ns(stamps: torch.Tensor) -> int:
    """From the end that a kernel stamps to where the next one begins, the median; `stamps`, int64 [N, 2] of at most
    `chain.MOST_ROWS`, are overwritten."""

    def launch(row: torch.Tensor) -> None:
        _empty_kernel[(1,)](row, num_warps=1, **chained(stamps))

    launch(stamps[0])  # compiles it
    _look_kernel[(1,)](stamps[0], _LONG_PAUSE_NS, num_warps=1)
    for row in stamps:
        launch(row)
    begun, ended = stamps.cpu().unbind(1)
    return int((begun[1:] - ended[:-1]).median())


def look_at_clock(place: torch.Tensor) -> None:
    """Into int64 [1], when this ends, after a pause: an event that is recorded next is passed right after it."""
    _look_kernel[(1,)](place, _PAUSE_NS, num_warps=1)
