"""Rank processes that are started before anybody knows whether they are needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest

from bireme import LLM, SamplingParams
from bireme.engine import pool as pool_module
from bireme.engine.messages import Program
from bireme.engine.pool import RankProcess, WorkerPool
from bireme.errors import CheckpointError


def test_a_world_takes_those_that_were_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "num_cores", lambda: 2)
    with WorkerPool() as pool:
        pool.start(2)
        early = [rank.process.pid for rank in pool._processes]
        with LLM("demo", tensor_parallel_size=2, pool=pool) as llm:
            assert llm.generate([[5, 6]], SamplingParams(temperature=0, max_tokens=2))[0].finished
        assert [rank.process.pid for rank in pool.take(2)] == early


def test_who_was_told_nothing_is_ended_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "num_cores", lambda: 1)
    pool = WorkerPool()
    pool.start(1)
    (early,) = pool._processes
    pool.close()
    assert early.process.returncode == -signal.SIGKILL


def test_more_than_there_are_cores_are_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "num_cores", lambda: 2)
    with WorkerPool() as pool:
        pool.start(3)
        assert not pool._processes


def test_a_model_of_its_own_pool_has_its_ranks_begin_while_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool_module, "num_cores", lambda: 2)
    llm = LLM("demo", tensor_parallel_size=2)
    first, second = llm._pool._processes
    assert not first.is_begun
    with llm:
        assert llm.generate([[5, 6]], SamplingParams(temperature=0, max_tokens=2))[0].finished
        assert llm._pool._processes == [first, second]
    assert first.process.returncode is not None


def test_a_model_that_nobody_closes_or_that_is_refused_leaves_no_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool_module, "num_cores", lambda: 2)
    llm = LLM("demo")
    (rank,) = llm._pool._processes
    del llm
    assert rank.process.returncode == -signal.SIGKILL
    started, start = [], pool_module._start

    def start_and_keep(program: Program) -> RankProcess:
        started.append(start(program))
        return started[-1]

    monkeypatch.setattr(pool_module, "_start", start_and_keep)
    with pytest.raises(CheckpointError, match="is no folder"):
        LLM("nowhere")
    assert [rank.process.returncode for rank in started] == [-signal.SIGKILL]


def test_a_refused_command_leaves_no_process_behind() -> None:
    mark = f"BIREME_MARK={uuid4().hex}"
    name, _, value = mark.partition("=")
    done = subprocess.run(
        [sys.executable, "-m", "bireme", "generate", "nowhere", "x", "-tp", "2"],
        env={**os.environ, name: value}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "'nowhere' is no folder" in done.stderr
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            assert mark.encode() not in (process / "environ").read_bytes(), process
