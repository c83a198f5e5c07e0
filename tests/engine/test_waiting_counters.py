"""How long one waits for a counter in shared memory: not beyond the deadline, spinning or asleep."""

from __future__ import annotations

import os
from collections.abc import Iterator
from threading import Event, Thread

import pytest

from bireme.parallel.counters import LINE_BYTES, Memory, create_memory
from bireme.parallel.shm_helper import load_helper

LONG_S = 3600.0
PATIENCE_S = 10.0  # after which the count comes to whoever still waits
SPINS_S = [0.0, LONG_S]


@pytest.fixture(params=[True, False], ids=["compiled", "from Python"])
def is_compiled(request: pytest.FixtureRequest) -> bool:
    if request.param and load_helper() is None:
        pytest.skip("no C compiler here")
    return bool(request.param)


@pytest.fixture
def path() -> Iterator[str]:
    fd, path = create_memory(LINE_BYTES, "counter")
    yield path
    os.close(fd)


@pytest.mark.parametrize("spin_s", SPINS_S)
@pytest.mark.parametrize("timeout_s", [0.0, 1e-5, 3e-3])
def test_a_count_that_is_not_reached_is_awaited_until_the_deadline(
    path: str, is_compiled: bool, spin_s: float, timeout_s: float
) -> None:
    memory = Memory(path, LINE_BYTES, 1, 1, is_compiled=is_compiled, spin_s=spin_s)
    counter, is_over = memory.counter(0), Event()
    counter.raise_to(4)
    rescuer = Thread(target=lambda: is_over.wait(PATIENCE_S) or memory.counter(0).raise_to(5))
    rescuer.start()
    assert counter.await_count(4, timeout_s)
    was_reached = counter.await_count(5, timeout_s)
    is_over.set()
    rescuer.join()
    assert not was_reached, "it was awaited far beyond the deadline"


@pytest.mark.parametrize("spin_s", SPINS_S)
def test_a_count_that_is_raised_meanwhile_is_seen(
    path: str, is_compiled: bool, spin_s: float
) -> None:
    memory = Memory(path, LINE_BYTES, 1, 1, is_compiled=is_compiled, spin_s=spin_s)
    counter = memory.counter(0)
    raiser = Thread(target=lambda: memory.counter(0).raise_to(1))
    raiser.start()
    assert counter.await_count(1, LONG_S)
    raiser.join()


def test_more_processes_than_cores_hardly_spin(path: str, is_compiled: bool) -> None:
    num_busy = len(os.sched_getaffinity(0)) + 1
    memory = Memory(path, LINE_BYTES, 1, num_busy, is_compiled=is_compiled, spin_s=LONG_S)
    assert memory.spin_s < 1e-5
