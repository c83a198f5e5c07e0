"""`bireme bench latency`: one batch that begins and ends together, or none."""

from __future__ import annotations

import json

import pytest

from bireme.cli import run

COMMAND = ["bench", "latency", "demo", "--output-len", "4", "--num-iters-warmup", "1"]


def test_as_many_iterations_as_count_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*COMMAND, "--num-iters", "3", "--batch-size", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["latencies"]) == 3
    assert 0 < told["ttft_s"]["p50"] < told["avg_latency"]
    assert told["num_prompts"] == 2


def test_one_token_has_no_time_from_token_to_token(capsys: pytest.CaptureFixture[str]) -> None:
    once = [*COMMAND, "--output-len", "1", "--num-iters", "1"]
    assert run(once) == 0
    told = capsys.readouterr().out
    assert "to the first tokens" in told
    assert "from token to token" not in told
    assert "weights read" not in told
    assert run([*once, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step_s"] == 0


def test_a_batch_of_more_than_run_at_once_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*COMMAND, "--batch-size", "5", "--max-num-seqs", "4"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("bireme: a batch of 5 does not begin together: at most 4 requests")
