"""Ranks that die, raise or hang end as one named error, and nothing is left behind."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bireme import LLM, SamplingParams
from bireme.engine.messages import Capture, Leave, send
from bireme.engine.pool import WorkerPool
from bireme.engine.world import World
from bireme.errors import EngineError, RankError

PARAMS = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


SETTINGS: dict[str, Any] = {
    "tensor_parallel_size": 2, "pipeline_parallel_size": 2, "dtype": "float32",
}  # fmt: skip


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM("demo", **SETTINGS) as model:
        yield model


@pytest.fixture
def over_gloo() -> Iterator[LLM]:
    with LLM("demo", transport="distributed", **SETTINGS) as model:
        yield model


def pids(llm: LLM) -> list[int]:
    return [rank.process.pid for rank in llm.executor._world.ranks]


def is_alive(pid: int) -> bool:
    """Zombies do not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("victim", [0, 3])
@pytest.mark.parametrize("transport", ["llm", "over_gloo"])
def test_a_killed_rank_is_named_and_takes_the_others_with_it(
    request: pytest.FixtureRequest, transport: str, victim: int
) -> None:
    llm: LLM = request.getfixturevalue(transport)
    stream = llm.stream([[5, 6, 7]], PARAMS)
    next(stream)
    processes = pids(llm)
    os.kill(processes[victim], signal.SIGKILL)
    with pytest.raises(RankError, match="killed by signal 9") as caught:
        list(stream)
    assert caught.value.rank_name == llm.plan.rank_names[victim]
    assert not any(map(is_alive, processes))
    assert all(span.end_ns for spans in llm.spans().values() for span in spans)
    assert len(llm.spans()[llm.plan.rank_names[victim]]) > 10, "spans outlive the rank"


# nobody closes its sockets
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_model_that_is_forgotten_amid_a_stream_takes_its_ranks_along() -> None:
    model = LLM("demo", **SETTINGS)
    stream = model.stream([[5, 6, 7]], PARAMS)
    assert [len(next(stream).token_ids) for _ in range(3)] == [1, 1, 1]
    processes = [rank.process for rank in model.executor._world.ranks]
    del model, stream
    gc.collect()
    for process in processes:
        process.wait(timeout=30)


def test_a_second_ctrl_c_ends_the_ranks_amid_a_step(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, processes = llm.stream([[5, 6, 7]], PARAMS), pids(llm)
    next(stream)

    def collect() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second one did not get through")

    monkeypatch.setattr(llm.executor, "collect", collect)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert not any(map(is_alive, processes))
    with pytest.raises(EngineError, match="make a new LLM"):
        llm.generate([[5]])


def test_a_program_that_ignores_ctrl_c_goes_on_ignoring_it(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = llm.executor.collect

    def interrupted() -> Any:
        signal.raise_signal(signal.SIGINT)
        return collect()

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    monkeypatch.setattr(llm.executor, "collect", interrupted)
    try:
        outputs = llm.generate([[5, 6]], SamplingParams(max_tokens=3, ignore_eos=True))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(outputs[0].outputs[0].token_ids) == 3


def test_a_rank_that_reads_nothing_is_named_at_a_deadline() -> None:
    with WorkerPool() as own:
        world = World(own, ["rank 0"], (1,), timeout_s=1.0)
        process = world.ranks[0].process.pid
        os.kill(process, signal.SIGSTOP)
        with pytest.raises(
            RankError, match=r"rank 0: .* taking a command \(its process is stopped"
        ):
            world.send(0, Capture("x" * 10_000_000, probes=False))
        assert not is_alive(process)


def test_a_pool_that_is_interrupted_while_it_closes_leaves_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = WorkerPool()
    ranks = own.take(2)
    os.kill(ranks[1].process.pid, signal.SIGSTOP)
    waits = iter([KeyboardInterrupt])
    whole = subprocess.Popen.wait

    def wait(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        for interrupt in waits:
            raise interrupt
        return whole(self, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        own.close()
    assert not any(is_alive(rank.process.pid) for rank in ranks)


@contextmanager
def patient(*widths: int) -> Iterator[LLM]:
    """Waits 300 s for a step, until it learned what steps take here."""
    with WorkerPool() as own, LLM("demo", tensor_parallel_size=widths, pool=own) as model:
        model.generate([[5, 6, 7]] * 4, SamplingParams(temperature=0, max_tokens=8))
        yield model


def named(llm: LLM, number: signal.Signals, victim: int) -> str:
    """Sends a signal to one rank amid a stream; that rank is named, and all end. What was said."""
    stream = llm.stream([[5, 6, 7]] * 4, PARAMS)
    next(stream)
    processes, start = pids(llm), time.monotonic()
    os.kill(processes[victim], number)
    with pytest.raises(RankError) as caught:
        list(stream)
    assert time.monotonic() - start < 60, (
        "it waited for what it was set to, not for what it learned"
    )
    assert caught.value.rank_name == llm.plan.rank_names[victim]
    assert not any(map(is_alive, processes))
    return caught.value.cause


@pytest.mark.parametrize(("widths", "victim"), [((1,), 0), ((2,), 1), ((1, 1), 0), ((2, 1), 2)])
def test_a_stopped_rank_is_named_at_a_learned_deadline(
    widths: tuple[int, ...], victim: int
) -> None:
    with patient(*widths) as llm:
        said = named(llm, signal.SIGSTOP, victim)
    assert "in time (its process is stopped" in said


def test_a_rank_that_stops_before_the_first_request_is_named_at_a_learned_deadline() -> None:
    """It has made a step when it started; the limit that is set is 300 s."""
    with LLM("demo", **SETTINGS) as model:
        model.start()
        start = time.monotonic()
        os.kill(pids(model)[2], signal.SIGSTOP)
        with pytest.raises(RankError, match="its process is stopped") as caught:
            model.generate([[5]], PARAMS)
        assert time.monotonic() - start < 60
        assert caught.value.rank_name == model.plan.rank_names[2]


@pytest.fixture
def can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks hang at SIGUSR1, in their main thread, and go on living; at SIGUSR2 they raise there."""
    code = """
    import signal, threading
    def fail(*_):
        raise RuntimeError("planted")
    signal.signal(signal.SIGUSR1, lambda *_: threading.Event().wait())
    signal.signal(signal.SIGUSR2, fail)
    """
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(code))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)


@pytest.mark.usefixtures("can_fail")
@pytest.mark.parametrize(("widths", "victim"), [((1,), 0), ((2, 2), 1), ((2, 2), 2)])
def test_a_rank_that_hangs_is_told_from_those_that_wait_for_it(
    widths: tuple[int, ...], victim: int
) -> None:
    with patient(*widths) as llm:
        said = named(llm, signal.SIGUSR1, victim)
    assert "did not finish step" in said
    assert "stopped" not in said


@pytest.mark.usefixtures("can_fail")
@pytest.mark.parametrize(("widths", "victim"), [((2,), 1), ((1, 1), 0)])
def test_a_rank_that_raises_amid_a_step_is_named_with_its_cause(
    widths: tuple[int, ...], victim: int
) -> None:
    with patient(*widths) as llm:
        assert named(llm, signal.SIGUSR2, victim) == "RuntimeError: planted"


def test_without_the_compiled_helper_a_killed_rank_is_named_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BIREME_COMPILED_HELPER", "0")
    with patient(2) as llm:
        assert "killed by signal 9" in named(llm, signal.SIGKILL, 0)


def test_a_rank_that_raises_shows_its_traceback_once(tmp_path: Path) -> None:
    """A file that is cut after the driver looked at it fails in the rank."""
    code = textwrap.dedent(
        f"""
        import shutil
        from bireme import LLM
        from bireme.checkpoint.hub import resolve_model
        shutil.copytree(resolve_model("demo"), {str(tmp_path / "m")!r})
        llm = LLM({str(tmp_path / "m")!r}, tensor_parallel_size=2)
        (llm.model.folder / "model.safetensors").write_bytes(b"cut")
        llm.start()
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "model.safetensors is cut" in done.stderr
    assert done.stderr.count("Traceback") == 1
    assert "(stage 0, tp " in done.stderr


def test_a_pool_starts_anew_after_a_failure() -> None:
    with WorkerPool() as pool:
        with LLM("demo", dtype="float32", pool=pool) as llm:
            stream = llm.stream([[5]], PARAMS)
            next(stream)
            os.kill(pids(llm)[0], signal.SIGKILL)
            with pytest.raises(RankError):
                list(stream)
        with LLM("demo", dtype="float32", pool=pool) as llm:
            assert llm.generate([[5]], SamplingParams(temperature=0, max_tokens=3))


DRIVER = """
import sys
from bireme import LLM, SamplingParams
with LLM("demo", tensor_parallel_size=2, pipeline_parallel_size=2, dtype="float32") as llm:
    for delta in llm.stream([[5, 6, 7]] * 4, SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)):
        print(*[rank.process.pid for rank in llm.executor._world.ranks], flush=True)
"""


def start_driver() -> tuple[subprocess.Popen[str], list[int]]:
    """A program that generates, once its first tokens are there; and its ranks."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    return driver, [int(pid) for pid in driver.stdout.readline().split()]


def wait_for_end(processes: list[int]) -> None:
    """Waits on the processes themselves: pidfds become readable at their end."""
    import select

    for pid in processes:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        ready, _, _ = select.select([fd], [], [], 20)
        os.close(fd)
        assert ready, f"process {pid} outlived its driver"


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_ranks_end_with_their_driver(end: signal.Signals) -> None:
    driver, ranks = start_driver()
    driver.send_signal(end)
    driver.communicate(timeout=30)
    wait_for_end(ranks)


KILLED = """
import os, signal
from bireme import LLM, SamplingParams
from bireme.engine.executor import WorkerExecutor
from bireme.engine.world import World

def die(world, *_):
    print(*[rank.process.pid for rank in world.ranks], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if {place!r} == "joining":
    World.gather = die
elif {place!r} == "loading":
    WorkerExecutor._load = lambda self: die(self._world)
elif {place!r} == "waiting":
    WorkerExecutor.collect = lambda self: die(self._world)
LLM("demo", transport="distributed", tensor_parallel_size=2, dtype="float32").generate([[5]])
"""


@pytest.mark.parametrize("place", ["joining", "loading", "waiting"])
def test_a_driver_that_is_killed_leaves_no_file_behind(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", KILLED.format(place=place)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    wait_for_end([int(pid) for pid in done.stdout.split()])
    assert list(tmp_path.iterdir()) == []


def test_what_an_engine_over_sockets_needs_of_files_is_gone_once_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with LLM("demo", transport="distributed", tensor_parallel_size=2, dtype="float32") as llm:
        llm.start()
        assert list(tmp_path.iterdir()) == []
        assert llm.generate([[5]], SamplingParams(max_tokens=3))


def test_ctrl_c_ends_everything_cleanly() -> None:
    driver, ranks = start_driver()
    driver.send_signal(signal.SIGINT)
    _, errors = driver.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert errors.count("Traceback") == 1
    wait_for_end(ranks)


def listening(pid: int) -> set[str]:
    """Addresses (hexadecimal) that a process listens on, from its descriptors and the kernel's table."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(descriptor)
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].partition(":")[0])
    return found


def test_ranks_that_share_memory_listen_nowhere(llm: LLM) -> None:
    assert [listening(rank) for rank in pids(llm)] == [set()] * 4


def test_every_listening_socket_is_on_loopback(over_gloo: LLM) -> None:
    loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    addresses = {rank: listening(rank) for rank in pids(over_gloo)}
    assert any(addresses.values()), (
        "gloo listens somewhere; if it is not found, this test sees nothing"
    )
    assert set().union(*addresses.values()) <= loopback
    assert listening(os.getpid()) <= loopback


def test_ranks_stay_on_loopback_whatever_the_shell_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it gloo listens at the address of the host's name, which is loopback on some hosts."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "eth0")
    with WorkerPool() as own:
        (rank,) = own.take(1)
        send(rank.sock, Leave())
        rank.replies.next()  # it runs: before that its environment is not yet in place
        given = Path(f"/proc/{rank.process.pid}/environ").read_bytes().split(b"\0")
    assert {b"GLOO_SOCKET_IFNAME=lo", b"NCCL_SOCKET_IFNAME=lo"} <= set(given)


def test_the_socket_test_sees_a_socket_that_listens_everywhere() -> None:
    with socket.create_server(("0.0.0.0", 0)):
        assert "00000000" in listening(os.getpid())
