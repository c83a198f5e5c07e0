"""Requests take room while they are wanted: one too many is told so, and who leaves frees it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from served import Served, serving
from streaming import COMPLETIONS, LONG, Streaming, connect, post


@pytest.fixture(scope="module")
def small() -> Iterator[Served]:
    """One request runs, and one may wait."""
    options = ("--max-num-seqs", "1", "--max-num-waiting", "1", "--dtype", "float32",
               "--max-body-bytes", "64KiB")  # fmt: skip
    with serving(*options) as server:
        yield server


def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        time.sleep(0.01)


def test_more_requests_than_may_wait_get_429_and_when_to_come_again(small: Served) -> None:
    running = Streaming(small, max_tokens=100)
    with connect(small) as waiting:
        waiting.sendall(post(COMPLETIONS, json.dumps(LONG).encode()))
        until(lambda: small.metric("num_requests_waiting") == 1)
        found = small.ask("POST", COMPLETIONS, {"prompt": "x", "max_tokens": 1})
        assert found.status == 429
        assert found.headers["retry-after"] == "1"
        assert found.error["code"] == "rate_limit_exceeded"
        assert small.ask("POST", COMPLETIONS, {"prompt": "x", "n": 3}).status == 400
    assert len(running.tokens()) == 100
    assert small.ask("POST", COMPLETIONS, {"prompt": "x", "max_tokens": 1}).status == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_request(small: Served, stream: bool) -> None:
    """Long before it would have ended: what comes next is answered at once, with one place for both."""
    body = {**LONG, "max_tokens": 1000, "stream": stream}
    name = f"leaves-{stream}"
    with connect(small) as sock:
        sock.sendall(post(COMPLETIONS, json.dumps(body).encode(), f"x-request-id: {name}"))
        until(lambda: small.metric("num_requests_running") == 1)
    until(lambda: small.metric("num_requests_running") == 0)
    line = small.wait_for(f"request_id={name} ").string
    assert "left=true" in line
    (num_tokens,) = (
        int(it.split("=")[1]) for it in line.split() if it.startswith("completion_tokens")
    )
    assert num_tokens < 1000


def test_clients_that_leave_while_they_wait_are_never_run(small: Served) -> None:
    running = Streaming(small, max_tokens=100)
    for _ in range(3):
        with connect(small) as sock:
            sock.sendall(post(COMPLETIONS, json.dumps(LONG).encode()))
            until(lambda: small.metric("num_requests_waiting") == 1)
        until(lambda: small.metric("num_requests_waiting") == 0)
    assert len(running.tokens()) == 100
    assert small.ask("GET", "/load").json == {"server_load": 0}


def test_bodies_of_all_requests_are_bounded_together(small: Served) -> None:
    """Those that come are counted, whole or not; room is free again once they are gone."""
    part = b"x" * (60 << 10)
    with ExitStack() as stack:
        for _ in range(17):
            sock = stack.enter_context(connect(small))
            head = post(COMPLETIONS, b"").replace(b"Length: 0", b"Length: 65000")
            sock.sendall(head + part)
        until(lambda: small.ask("GET", "/load").json == {"server_load": 17})
        found = small.ask("POST", COMPLETIONS, {"prompt": "x" * 50_000})
        assert (found.status, found.headers["retry-after"]) == (429, "1")
        assert "bodies of all requests" in found.error["message"]
    until(lambda: small.ask("GET", "/load").json == {"server_load": 0})
    assert small.ask("POST", COMPLETIONS, {"prompt": "x", "max_tokens": 1}).status == 200
