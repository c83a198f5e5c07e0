"""How a server ends: when it is told to, when a part of it is killed, and when it cannot start."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served import DEADLINE_S, Served, arguments, is_there, leftovers, serving, started
from streaming import COMPLETIONS, LONG, Streaming, connect, post

from bireme.checkpoint.hub import DEMO
from bireme.engine.process_stat import is_stopped


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Of files, whatever a test does."""
    before = leftovers()
    yield
    until(lambda: leftovers() <= before)


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def stop(pid: int) -> None:
    """Returns once none of its threads runs: a signal is only sent by then."""
    os.kill(pid, signal.SIGSTOP)
    threads = Path(f"/proc/{pid}/task")
    until(lambda: all(is_stopped(int(thread.name)) for thread in threads.iterdir()))


def check_all_ended(pids: list[int]) -> None:
    assert pids
    until(lambda: not any(map(is_there, pids)))


def test_sigterm_lets_running_streams_end_and_takes_no_more() -> None:
    with serving("--dtype", "float32") as server:
        pids = server.descendants()
        stream = Streaming(server, max_tokens=300)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("shutting down requests=1")
        refused = server.ask("POST", COMPLETIONS, {"prompt": "x"})
        assert (refused.status, refused.error["code"]) == (503, "shutting_down")
        assert refused.headers["retry-after"]
        health = server.ask("GET", "/health")
        assert (health.status, health.json) == (503, {"status": "shutting down"})
        assert len(stream.tokens()) == 300
        assert server.end() == 0
        check_all_ended(pids)


def test_what_takes_longer_than_the_shutdown_timeout_is_ended() -> None:
    with serving("--dtype", "float32", "--shutdown-timeout", "0.2") as server:
        pids = server.descendants()
        stream = Streaming(server, max_tokens=1000)
        server.process.send_signal(signal.SIGTERM)
        text = stream.text()
        assert text.count(b"\n\n") < 1000
        assert "shutting down" in last_event(text)["error"]["message"]
        assert server.end() == 0
        assert any("not all requests ended in time" in line for line in server.told)
        check_all_ended(pids)


def test_a_request_that_has_not_arrived_holds_nothing_up() -> None:
    with (
        serving("--dtype", "float32", "--shutdown-timeout", "60") as server,
        connect(server) as sock,
    ):
        sock.sendall(post(COMPLETIONS, b"").replace(b"Length: 0", b"Length: 100") + b"{")
        until(lambda: server.ask("GET", "/load").json == {"server_load": 1})
        server.process.send_signal(signal.SIGTERM)
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 503 ")
        assert server.process.wait(20) == 0
        assert not any("Traceback" in line for line in server.told)


def test_metrics_do_not_wait_for_an_engine_that_hangs() -> None:
    with serving("--dtype", "float32") as server:
        engine = server.descendants()[0]
        stop(engine)
        assert server.metric("engine_ready") == 0
        assert server.ask("GET", "/health").json == {"status": "ready"}  # not given up yet
        os.kill(engine, signal.SIGCONT)
        until(lambda: server.metric("num_requests_running") == 0)


def test_a_second_ctrl_c_ends_at_once() -> None:
    with serving("--dtype", "float32") as server:
        pids = server.descendants()
        stream = Streaming(server, max_tokens=1000)
        server.process.send_signal(signal.SIGINT)
        server.wait_for("shutting down requests=1")
        server.process.send_signal(signal.SIGINT)
        assert stream.text().count(b"\n\n") < 1000
        assert server.end() == 0
        check_all_ended(pids)


def test_a_second_ctrl_c_does_not_wait_for_an_engine_that_hangs() -> None:
    with serving("--dtype", "float32") as server:
        pids = server.descendants()
        stop(pids[0])
        server.process.send_signal(signal.SIGINT)
        server.wait_for("shutting down requests=0")
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(8) == 0  # it would be waited for 20 s
        check_all_ended(pids)


def test_ctrl_c_ends_a_server_that_still_loads() -> None:
    with started() as server:
        until(lambda: len(server.descendants()) >= 2)  # the engine has begun to start its rank
        pids = server.descendants()
        server.process.send_signal(signal.SIGTERM)
        server.end()
        check_all_ended(pids)


def test_a_killed_front_end_takes_its_engine_and_ranks_along() -> None:
    with serving("--dtype", "float32", "-tp", "2") as server:
        pids = server.descendants()
        assert len(pids) >= 3
        stream = Streaming(server, max_tokens=1000)
        server.process.kill()
        assert b"[DONE]" not in stream.text()
        check_all_ended(pids)


@pytest.mark.parametrize("victim", ["engine", "rank"])
def test_a_killed_part_ends_streams_with_an_error_that_names_it(victim: str) -> None:
    with serving("--dtype", "float32", "-pp", "2") as server:
        pids = server.descendants()
        ranks = [pid for pid in pids if b"engine.worker" in command(pid)]
        assert len(ranks) == 2
        stream = Streaming(server, max_tokens=1000)
        os.kill(pids[0] if victim == "engine" else ranks[1], signal.SIGKILL)
        text = stream.text()
        named = "signal 9" if victim == "engine" else "rank 1"
        error = last_event(text)["error"]
        assert named in error["message"]
        assert (error["type"], error["code"]) == ("service_unavailable_error", "engine_error")
        assert text.endswith(b"data: [DONE]\n\n")
        health = server.ask("GET", "/health")
        assert (health.status, health.json["status"]) == (503, "broken")
        assert named in health.json["error"]
        server.wait_for(rf"the engine broke; requests are refused error=.*{named}")
        refused = server.ask("POST", COMPLETIONS, {"prompt": "x"})
        assert (refused.status, refused.error["code"]) == (503, "engine_error")
        assert server.metric("engine_ready") == 0
        check_all_ended(pids)
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0


def command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def last_event(text: bytes) -> dict[str, Any]:
    """Before [DONE], if there is one."""
    events = [it for it in text.split(b"\n\n") if it and it != b"data: [DONE]"]
    found: dict[str, Any] = json.loads(events[-1].removeprefix(b"data: "))
    return found


def test_a_whole_answer_that_breaks_is_an_error_of_its_own() -> None:
    with serving("--dtype", "float32") as server:
        connection = http.client.HTTPConnection(server.host, server.port, timeout=DEADLINE_S)
        body = json.dumps({**LONG, "max_tokens": 1000, "stream": False})
        connection.request("POST", COMPLETIONS, body, {"Content-Type": "application/json"})
        until(lambda: server.metric("num_requests_running") == 1)
        os.kill(server.descendants()[0], signal.SIGKILL)
        response = connection.getresponse()
        assert response.status == 503
        assert "signal 9" in json.loads(response.read())["error"]["message"]
        connection.close()


@pytest.mark.parametrize(
    ("model", "options", "complaint"),
    [
        ("/nowhere/at/all", (), "/nowhere/at/all"),
        (DEMO, ("--max-model-len", "999999"), "999999"),
        (DEMO, ("--memory-limit", "1MiB"), "1.0 MiB"),
        (DEMO, ("-tp", "9"), "8 query heads"),
    ],
)
def test_what_cannot_start_says_so_in_a_line_and_exits_with_2(
    model: str, options: tuple[str, ...], complaint: str
) -> None:
    done = subprocess.run(
        arguments(model, "--port", "0", *options),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("bireme: ")
    assert complaint in line


def test_a_server_whose_log_nobody_reads_any_more_serves_and_ends() -> None:
    reader, writer = os.pipe()
    process = subprocess.Popen(
        arguments(DEMO, "--port", "0"), stderr=writer, start_new_session=True
    )
    os.close(writer)
    told = b""
    while not (found := re.search(rb"serving .* at http://127.0.0.1:(\d+)/v1.*\n.*\n", told)):
        told += os.read(reader, 1 << 16)
    os.close(reader)
    try:
        server = Served(process, port=int(found[1]))
        assert server.ask("POST", COMPLETIONS, {"prompt": "x", "max_tokens": 1}).status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (("--chat-template",), "line 1"),
        (("--ssl-certfile", "--ssl-keyfile"), "TLS cannot be set up"),
    ],
)
def test_a_file_of_no_use_is_told_before_anything_starts(
    tmp_path: Path, names: tuple[str, ...], complaint: str
) -> None:
    path = tmp_path / "file"
    path.write_text("{% if %}")
    options = [part for name in names for part in (name, str(path))]
    done = subprocess.run(
        arguments(DEMO, "--port", "0", *options),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert complaint in line
    assert str(path) in line
