"""Ranks whose clock is another, as on another host: their times are told on the driver's clock."""

from __future__ import annotations

import os
import subprocess
import textwrap
import time
from pathlib import Path

import pytest

from bireme import LLM, SamplingParams
from bireme.engine.pool import WorkerPool
from bireme.observe.causes import Row
from bireme.observe.ledger import make_ledger
from bireme.trace import SpanKind

AHEAD_S = 1000
# Every second process that is started here gets a time namespace, which its child is in.
OTHER_CLOCK = f"""
    import ctypes, os, sys, fcntl
    from pathlib import Path

    CLONE_NEWTIME = 0x80
    if "bireme.engine.worker" in sys.orig_argv:
        with Path(__file__).with_name("count").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write("x")
            file.flush()
            number = file.tell()
        if number % 2 == 0:
            if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWTIME):
                raise OSError(ctypes.get_errno(), "unshare")
            Path("/proc/self/timens_offsets").write_text("monotonic {AHEAD_S} 0")
            child = os.fork()
            if child:
                os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def has_time_namespaces() -> bool:
    command = ["unshare", "--time", "--fork", "--monotonic", "1", "true"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not has_time_namespaces(), reason="needs the right to make time namespaces")
def test_times_of_another_clock_are_told_on_the_drivers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(OTHER_CLOCK))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    begun_ns = time.monotonic_ns()
    with WorkerPool() as pool, LLM("demo", pipeline_parallel_size=2, pool=pool) as llm:
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        llm.generate([[5, 6, 7], [8, 9]], params)
        recorded = llm.recorded()
    over_ns = time.monotonic_ns()
    for rank in recorded.ranks:
        steps = [span for span in rank.spans if span.kind is SpanKind.STEP]
        assert len(steps) >= 20
        assert all(begun_ns < step.start_ns < step.end_ns < over_ns for step in steps)
    sent, taken = (
        {span.step_id: span for span in rank.spans if span.kind is kind and span.step_id}
        for rank, kind in zip(recorded.ranks, (SpanKind.SEND, SpanKind.RECV), strict=True)
    )
    late_ns = [taken[step].end_ns - sent[step].start_ns for step in sent.keys() & taken.keys()]
    assert min(late_ns) > -1_000_000, "no message comes before it was sent, but for the comparison"
    ledger = make_ledger(recorded)
    assert all(abs(rank.share(Row.UNATTRIBUTED)) <= 0.01 for rank in ledger.ranks)
