"""Counters in memory that processes of one host share: raised by one, awaited by others.

A waiter spins for a moment, then sleeps in a futex, both until a deadline at most, so that ranks
that share a core get on. Each lies on a cache line of its own: the count modulo 2^32, and a word
that says that someone sleeps. All who share them use the same of the two kinds of `Counter`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time

from bireme.errors import EngineError
from bireme.parallel.shm_helper import INTERRUPTED, REACHED, Helper, load_helper

LINE_BYTES = 64
_FUTEX, _WAIT, _WAKE = 202, 0, 1  # x86-64
_LIBC = ctypes.CDLL(None)
_FIRST_SLEEP_NS, _LONGEST_SLEEP_NS = 2_000_000, 32_000_000
_BEFORE = 1 << 31  # of a difference modulo 2^32: a count that was not reached yet
SPIN_S, _SPIN_WHEN_SHARED_S = 1e-4, 1e-6


def create_memory(num_bytes: int, name: str) -> tuple[int, str]:
    """Anonymous memory: its descriptor, and the path under which children open it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(fd, num_bytes)
    return fd, f"/proc/{os.getpid()}/fd/{fd}"


class Memory:
    """A shared file, mapped, that begins with counters; unmapped when nobody refers to it any more.

    `num_busy` processes that use it want a core each. Where they have one, waiters spin for `spin_s`.
    """

    def __init__(
        self,
        path: str,
        num_bytes: int,
        num_counters: int,
        num_busy: int,
        *,
        is_compiled: bool,
        spin_s: float = SPIN_S,
    ) -> None:
        with open(path, "r+b") as file:
            self.map = mmap.mmap(file.fileno(), num_bytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.words = memoryview(self.map)[: num_counters * LINE_BYTES].cast("I")
        self.helper = _required_helper() if is_compiled else None
        is_shared = num_busy > len(os.sched_getaffinity(0))
        self.spin_s = _SPIN_WHEN_SHARED_S if is_shared else spin_s

    def counter(self, index: int) -> Counter:
        return Counter(self, index) if self.helper is None else CompiledCounter(self, index)

    def raw(self, start: int, num_bytes: int) -> memoryview:
        return memoryview(self.map)[start : start + num_bytes]


def _required_helper() -> Helper:
    helper = load_helper()
    if helper is None:
        raise EngineError("this rank cannot load the compiled helper that its driver uses")
    return helper


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Counter:
    """From Python. Its stores are not fenced: a wake-up that crosses a sleeper's check is lost, so
    that sleeps are short at first, and longer the longer it waits."""

    def __init__(self, memory: Memory, index: int) -> None:
        self._memory = memory  # keeps it mapped
        self._words, self._at = memory.words, index * LINE_BYTES // 4
        self._address = ctypes.c_void_p(memory.address + index * LINE_BYTES)
        self._spin_s = memory.spin_s

    def has_reached(self, count: int) -> bool:
        return not (self._words[self._at] - count) & _BEFORE

    @property
    def value(self) -> int:
        return self._words[self._at]

    def raise_to(self, count: int) -> None:
        self._words[self._at] = count & 0xFFFFFFFF
        if self._words[self._at + 1]:
            self._words[self._at + 1] = 0
            _LIBC.syscall(_FUTEX, self._address, _WAKE, 0x7FFFFFFF, None, None, 0)

    def await_count(self, count: int, timeout_s: float) -> bool:
        """False if the count was not reached within `timeout_s`."""
        begun = time.monotonic()
        spin_end = begun + min(self._spin_s, timeout_s)
        while not self.has_reached(count):
            if time.monotonic() >= spin_end:
                return self._sleep(count, begun + timeout_s)
        return True

    def _sleep(self, count: int, deadline: float) -> bool:
        words, at = self._words, self._at
        sleep_ns = _FIRST_SLEEP_NS
        while ((seen := words[at]) - count) & _BEFORE:
            left_ns = int((deadline - time.monotonic()) * 1e9)
            if left_ns <= 0:
                return False
            words[at + 1] = 1
            pause = ctypes.byref(_Timespec(0, min(sleep_ns, left_ns)))
            _LIBC.syscall(_FUTEX, self._address, _WAIT, ctypes.c_uint(seen), pause, None, 0)
            sleep_ns = min(2 * sleep_ns, _LONGEST_SLEEP_NS)
        return True


class CompiledCounter(Counter):
    """By the compiled helper, which loses no wake-up."""

    def __init__(self, memory: Memory, index: int) -> None:
        super().__init__(memory, index)
        assert memory.helper is not None
        self._raise, self._await = memory.helper.raise_to, memory.helper.await_count
        self._spin_ns = round(1e9 * memory.spin_s)

    def raise_to(self, count: int) -> None:
        self._raise(self._address, count & 0xFFFFFFFF)

    def await_count(self, count: int, timeout_s: float) -> bool:
        if self.has_reached(count):
            return True
        deadline = time.monotonic() + timeout_s
        while True:  # interrupted: Python handles the signal between two turns
            left_ns = int(max(0.0, deadline - time.monotonic()) * 1e9)
            found = self._await(self._address, count & 0xFFFFFFFF, self._spin_ns, left_ns)
            if found != INTERRUPTED:
                return bool(found == REACHED)
