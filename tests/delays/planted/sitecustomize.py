"""What a rank of these tests runs before anything else: it is held up in its stage's work, and may be on
another host, as the folder PLANTED_DELAYS says."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
from pathlib import Path
from typing import Any

_CLONE_NEWNET = 0x40000000


class Planted:
    """`rank-N` in the folder holds the seconds that rank N sleeps in each pass through its work: a pace
    in all, and a delay in those from `first` to before `stop`. When it slept is added to `slept-N`.
    `host-N` names rank N's network namespace, and the interface through which it talks; `paged-N` is a file that
    rank N reads in each pass through its memory, which is taken away before."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._rank = folder, -1
        self._home, self._is_away = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC), False
        self._asked, self._num_passes = "", 0
        self._first: int | None = None  # of its stage's blocks

    def join(self, rank: int) -> None:
        self._rank, self._first = rank, None
        host = self._folder / f"host-{rank}"
        if host.exists():
            path, os.environ["GLOO_SOCKET_IFNAME"] = host.read_text().split()
            with open(path) as namespace:
                _enter(namespace.fileno())
            self._is_away = True
        elif self._is_away:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            _enter(self._home)
            self._is_away = False

    def hold_up_at(self, block: int) -> None:
        """Once a pass."""
        if self._first is None:
            self._first = block
        if block == self._first:
            self.hold_up()

    def hold_up(self) -> None:
        self._read_pages()
        asked = (self._folder / f"rank-{self._rank}").read_text()
        if asked != self._asked:
            self._asked, self._num_passes = asked, 0
        _, pace, delay, first, stop = asked.split()
        time.sleep(float(pace))
        if int(first) <= self._num_passes < int(stop):
            start = time.monotonic_ns()
            time.sleep(float(delay))
            with (self._folder / f"slept-{self._rank}").open("a") as file:
                file.write(f"{start} {time.monotonic_ns()}\n")
        self._num_passes += 1

    def _read_pages(self) -> None:
        path = self._folder / f"paged-{self._rank}"
        if path.exists():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
                    pages.madvise(mmap.MADV_RANDOM)
                    sum(pages[:: mmap.PAGESIZE])


def _enter(namespace: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def plant(planted: Planted) -> None:
    from bireme.engine import rank

    join = rank.Rank.join

    def joined(self: Any, command: Any) -> Any:
        planted.join(command.rank)
        return join(self, command)

    rank.Rank.join = joined  # type: ignore[method-assign]
    if "bireme.vision.worker" in sys.orig_argv:
        plant_in_vision(planted)
    else:
        plant_in_language(planted)


def plant_in_language(planted: Planted) -> None:
    from bireme.models.blocks import StageModel

    forward = StageModel.forward

    def held_up(self: Any, x: Any, step: Any) -> Any:
        planted.hold_up()
        return forward(self, x, step)

    StageModel.forward = held_up  # type: ignore[method-assign]


def plant_in_vision(planted: Planted) -> None:
    from planted import slow_network

    slow_network.on_block.append(planted.hold_up_at)


if {"bireme.vision.worker", "bireme.engine.worker"} & set(sys.orig_argv):
    plant(Planted(Path(os.environ["PLANTED_DELAYS"])))
