"""The bubble ledger of a running server, over HTTP, in the metrics and in a terminal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from served import Served, serving
from streaming import Streaming

from bireme.cli import run as command
from bireme.observe.causes import Row


def test_the_last_seconds_are_accounted_for(piped: Served) -> None:
    Streaming(piped, max_tokens=200).tokens()
    found = piped.ask("GET", "/debug/ledger?seconds=2").json
    assert 0 < found["seconds"] <= 2
    assert [rank["stage"] for rank in found["ranks"]] == [0, 1]
    for rank in found["ranks"]:
        assert set(rank["shares"]) == set(Row)
        assert sum(rank["shares"].values()) == pytest.approx(1)
        assert rank["shares"]["unattributed"] < 0.01
        assert rank["shares"]["compute"] > 0
        assert rank["shares"]["token_dependency"] > 0  # one request, two stages
        assert len(rank["line"]) == 100


def test_a_server_without_requests_is_starved(piped: Served) -> None:
    piped.ask("POST", "/v1/completions", {"prompt": "x", "max_tokens": 1})
    for _ in range(100):  # the engine may come to rest a moment after its answer is there
        found = piped.ask("GET", "/debug/ledger?seconds=0.001").json
        starved = [rank["shares"]["starved"] for rank in found["ranks"]]
        if starved == [1.0, 1.0]:
            break
    assert starved == [1.0, 1.0]


def test_metrics_show_the_last_moment(piped: Served) -> None:
    text = piped.ask("GET", "/metrics").text
    found = re.findall(r'^bireme:ledger_share{.*rank="(.)".*row="(\w+)".*} (\S+)$', text, re.M)
    assert {(rank, row) for rank, row, _ in found} == {(rank, row) for rank in "01" for row in Row}
    assert sum(float(share) for _, _, share in found) == pytest.approx(2)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "x", "1e9"])
def test_a_window_that_cannot_be_is_refused(piped: Served, seconds: str) -> None:
    assert piped.ask("GET", f"/debug/ledger?seconds={seconds}").status == 400


def test_a_server_says_how_it_runs(piped: Served) -> None:
    found = piped.ask("GET", "/debug/setup").json
    assert [(rank["name"], rank["stage"]) for rank in found["ranks"]] == [
        ("rank 0 (stage 0, tp 0)", 0), ("rank 1 (stage 1, tp 0)", 1),
    ]  # fmt: skip
    assert found["num_cores"] == len(os.sched_getaffinity(0))
    assert {rank["device"] for rank in found["ranks"]} == {"cpu"}


def test_the_doctor_watches_a_server(piped: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """One request at a time is too little for two stages, until nobody asks any more."""
    stream = Streaming(piped, max_tokens=800)
    assert command(["doctor", piped.url, "--seconds", "1"]) == 1
    assert "1. too few requests for 2 stages (few-requests)" in capsys.readouterr().out
    stream.tokens()
    assert command(["doctor", piped.url, "--seconds", "0.2"]) == 0
    assert ": nothing found" in capsys.readouterr().out


def test_the_command_shows_a_servers_ledger(piped: Served) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bireme", "ledger", piped.url, "--seconds", "1"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "% of " in done.stdout
    assert len(re.findall(r"^rank \d \S+$", done.stdout, re.M)) == 2
    done = subprocess.run(
        [sys.executable, "-m", "bireme", "ledger", piped.url, "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert len(json.loads(done.stdout)["ranks"]) == 2


def test_what_a_killed_rank_wrote_can_still_be_read() -> None:
    """And its reader ends with the server."""
    with serving("--dtype", "float32", "-pp", "2") as server:
        Streaming(server, max_tokens=50).tokens()
        os.kill(server.descendants()[-1], signal.SIGKILL)
        while server.ask("GET", "/health").status == 200:
            pass
        found = server.ask("GET", "/debug/ledger?seconds=60").json
        assert all(rank["shares"]["compute"] > 0 for rank in found["ranks"])
        later = server.ask("GET", "/debug/ledger?seconds=60").json
        assert later["ranks"] == found["ranks"], "nothing was told since"
        assert later["until_s"] > found["until_s"] > 0
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
