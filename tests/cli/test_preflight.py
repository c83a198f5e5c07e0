"""Hosts are checked together before anything starts over them: here processes, each at an address of its own."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from bireme.cli import run
from bireme.doctor.preflight.messages import HostFacts
from bireme.doctor.preflight.place import bound
from bireme.engine.messages import framed, send
from preflight import Place, Said, begin, check_together, end

HERE, THERE = Place("127.0.0.1"), Place("127.0.0.2")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("artifacts")
    for width in (1, 2):
        assert run(["shard", "demo", str(folder / f"tp{width}"), "-tp", str(width)]) == 0
    return folder / "tp1", folder / "tp2"


def rules(*said: Said) -> list[list[str]]:
    """What was found; sums may be slow on a machine that does other things too."""
    for one in said:
        assert one.status == bool(one.report["findings"]), one.err
    return [[rule for rule in one.rules if rule != "slow-network"] for one in said]


def with_artifact(place: Place, folder: Path) -> Place:
    return Place(place.address, arguments=[str(folder)])


def test_hosts_that_are_alike_are_well(artifacts: tuple[Path, Path]) -> None:
    one, other = check_together(
        with_artifact(HERE, artifacts[0]), with_artifact(THERE, artifacts[0])
    )
    assert rules(one, other) == [[], []]
    assert one.report == other.report
    first, second = one.report["hosts"]
    assert (first["facts"]["name"], second["facts"]["name"]) == ("first", "second")
    assert first["facts"]["versions"].keys() >= {"bireme", "python", "torch"}
    assert first["facts"]["artifact"] == second["facts"]["artifact"] is not None
    (sums,) = one.report["sums"]
    assert (sums["hosts"], sums["transport"]) == (["first", "second"], "gloo")
    assert all(seconds > 0 for _, seconds, *_ in sums["points"])


def test_another_artifact_is_found(artifacts: tuple[Path, Path]) -> None:
    one, other = check_together(
        with_artifact(HERE, artifacts[0]), with_artifact(THERE, artifacts[1])
    )
    assert rules(one, other) == [["artifacts-differ"]] * 2
    for host in one.report["hosts"]:
        assert host["facts"]["artifact"] in one.report["findings"][0]["figure"]


OTHER_PLACE = """
import platform, time

now = time.time_ns
platform.python_version = lambda: "3.99.0"
time.time_ns = lambda: now() + 5 * 10**9
"""


def test_another_version_and_another_clock_are_found(tmp_path: Path) -> None:
    """Of a process that is told so from outside as it starts."""
    (tmp_path / "sitecustomize.py").write_text(OTHER_PLACE)
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    one, other = check_together(HERE, Place(THERE.address, environment={"PYTHONPATH": path}))
    assert rules(one, other) == [["versions-differ", "clock-offset"]] * 2
    versions, clock = one.report["findings"][:2]
    assert "second 3.99.0" in versions["figure"]
    assert versions["title"] == "hosts have different versions of python"
    assert clock["title"] == "the clock of second is wrong"
    assert clock["figure"].startswith(("4.9", "5.0"))


def test_a_host_that_does_not_come_is_counted() -> None:
    listening, _ = begin(HERE, "--hosts", "3", "--timeout", "0.1")
    said = end(listening)
    assert said.status == 1
    assert said.rules == ["unreachable"]
    (finding,) = said.report["findings"]
    assert finding["title"] == "2 of 3 hosts did not come"
    assert finding["figure"] == "1 came within 0.1 s: first"


def test_strangers_and_namesakes_are_sent_away_and_the_others_checked() -> None:
    listening, place = begin(HERE)
    host, _, port = place.rpartition(":")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        namesake = end(THERE.start("--join", place, "--host-name", "first"))
        assert namesake.status == 2
        assert "a host named first is there already" in namesake.err
        second = end(THERE.start("--join", place, "--host-name", "second"))
        assert rules(second, end(listening)) == [[], []]
        assert b"no host of this version" in stranger.recv(1000)


def facts(name: str) -> HostFacts:
    return HostFacts(
        name=name, address="127.0.0.1", interface="lo", port=1, device="cpu", versions={}, artifact=None
    )  # fmt: skip


def test_a_host_that_is_gone_is_named() -> None:
    listening, place = begin(HERE)
    host, _, port = place.rpartition(":")
    with socket.create_connection((host, int(port))) as sock:
        send(sock, facts("gone"))
    said = end(listening)
    assert said.status == 1
    assert said.err.splitlines()[-1].startswith("host gone is gone")


def test_a_host_that_talks_nonsense_is_named() -> None:
    listening, place = begin(HERE)
    host, _, port = place.rpartition(":")
    with socket.create_connection((host, int(port))) as sock:
        send(sock, facts("odd"))
        sock.recv(1)  # it is let in, and asked
        sock.sendall(framed(b"nonsense"))
        said = end(listening)
    assert said.status == 1
    last = said.err.splitlines()[-1]
    assert last.startswith("host odd gave no answer of this version's preflight, while reaching")
    assert "Traceback" not in said.err


@pytest.mark.parametrize("name", ["\x1b[31mred", "two\nlines", "\x9b1m"])
def test_what_would_steer_a_terminal_is_sent_away(name: str) -> None:
    listening, place = begin(HERE, "--timeout", "1")
    host, _, port = place.rpartition(":")
    with socket.create_connection((host, int(port))) as sock:
        send(sock, facts(name))
        said = end(listening)
        assert b"no host of this version" in sock.recv(1000)
    assert (said.status, said.rules) == (1, ["unreachable"])
    assert name not in said.err + said.out


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """A place at which something else listens, that says so much once somebody comes, and stays."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as threads:

        def serve() -> None:
            with listener.accept()[0] as sock, suppress(ConnectionResetError):
                sock.sendall(answer)
                while sock.recv(1000):
                    pass

        done = threads.submit(serve)
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        done.result(10)


@pytest.mark.parametrize(
    ("answer", "status", "told"),
    [
        (b"", 1, "said nothing for 0.2 s; see that it is bireme doctor --preflight --listen"),
        (b"\x09\0\0\0part", 1, "said nothing for 0.2 s"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", 2, "is no bireme doctor --preflight of this version"),
        (framed(b"nonsense"), 2, "is no bireme doctor --preflight of this version"),
    ],
)
def test_what_is_no_host_that_listens_is_told_in_a_line(
    answer: bytes, status: int, told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with answering(answer) as place:
        join = ["doctor", "--preflight", "--device", "cpu", "--join", place, "--timeout", "0.2"]
        assert run(join) == status
    found = capfd.readouterr().err
    assert f"at {place} {told}" in found
    assert found.count("\n") == 1


def test_a_port_is_free_again_right_after_a_run() -> None:
    listener = bound("127.0.0.1")
    port = listener.getsockname()[1]
    with listener, socket.create_connection(("127.0.0.1", port)):
        listener.accept()[0].close()  # first, so that this end lingers
    bound("127.0.0.1", port).close()


def test_three_hosts_are_measured_in_pairs_and_together() -> None:
    listening, place = begin(HERE, "--hosts", "3")
    others = [THERE.start("--join", place, "--host-name", name) for name in ("b", "a")]
    said = end(listening)
    assert rules(said, *map(end, others)) == [[], [], []]
    assert [sums["hosts"] for sums in said.report["sums"]] == [
        ["first", "a"], ["first", "b"], ["first", "a", "b"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "needs --listen ADDRESS on one host, and --join ADDRESS:PORT on each of the others"),
        (["--listen", "127.0.0.1", "--join", "127.0.0.1:1"], "needs --listen ADDRESS on one host"),
        (["--listen", "127.0.0.1", "--hosts", "1"], "hosts=1 must be at least 2"),
        (["--listen", "0.0.0.0"], "0.0.0.0 is every address of this host"),
        (["--listen", "203.0.113.7"], "203.0.113.7 is at no interface of this host"),
        (["--listen", "127.0.0.1", "--timeout", "0"], "timeout=0 must be above 0"),
        (
            ["--listen", "127.0.0.1", "--host-name", "a\x1b[1m"],
            "'a\\x1b[1m' holds control characters",
        ),
        (["--listen", "127.0.0.1:99999"], "'127.0.0.1:99999' is no address"),
        (["--join", "127.0.0.1"], "'127.0.0.1' is no address; give ADDRESS:PORT"),
        (["--join", "127.0.0.1:1"], "join 127.0.0.1:1 cannot be reached: Connection refused"),
        (["--join", "127.0.0.1:1", "--hosts", "2"], "--hosts is for the host that listens"),
        (["--listen", "127.0.0.1", "nowhere"], "nowhere is no folder"),
    ],
)
def test_wrong_input_is_told_in_a_line(
    arguments: list[str], told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["doctor", "--preflight", "--device", "cpu", *arguments]) == 2
    found = capfd.readouterr().err
    assert told in found
    assert found.count("\n") == 1


def test_without_preflight_its_options_mean_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "run", "--timeout", "3"]) == 2
    assert "--timeout is for --preflight" in capfd.readouterr().err
    assert run(["doctor"]) == 2
    assert "name a RUN, a URL, an ARTIFACT" in capfd.readouterr().err
