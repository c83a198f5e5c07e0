"""Stages that wait for nothing but ids: hardly ever with a batch a stage, mostly with one in all.

Real processes, each slowed inside its COMPUTE span without using a core, by a `sitecustomize.py`.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bireme import LLM, SamplingParams
from bireme.engine.pool import WorkerPool
from bireme.engine.scheduler import Scheduler
from bireme.observe.causes import Row
from bireme.observe.ledger import make_ledger
from bireme.trace import SpanKind

NUM_STAGES, NUM_TOKENS = 4, 10
SLOW = """
    import time
    from bireme.models.blocks import StageModel

    forward = StageModel.forward

    def slow_forward(self, x, step):
        time.sleep(0.08)
        return forward(self, x, step)

    StageModel.forward = slow_forward
"""


@pytest.fixture
def llm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(SLOW))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with WorkerPool() as own, LLM("demo", pipeline_parallel_size=NUM_STAGES, pool=own) as model:
        yield model


def put_one_batch_in_flight(llm: LLM) -> None:
    engine = llm.start()
    limits = replace(engine.scheduler.limits, pp_size=1)  # all requests in each batch
    engine.scheduler = Scheduler(limits, llm.plan.kinds)
    engine.scheduler.max_in_flight = 1


def shares(llm: LLM, num_requests: int, margin: int) -> list[float]:
    """Of each stage's time, but for `margin` steps at both ends: prompts are in, and no request has
    ended."""
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    llm.generate([[5 + index, 6, 7] for index in range(num_requests)], params)
    first, *_ = llm.spans().values()
    ends = [span.end_ns for span in first if span.kind is SpanKind.STEP]
    found = make_ledger(llm.recorded(), ends[margin], ends[-margin])
    assert all(abs(rank.share(Row.UNATTRIBUTED)) <= 0.01 for rank in found.ranks)
    return [rank.share(Row.TOKEN_DEPENDENCY) for rank in found.ranks]


@pytest.mark.slow
@pytest.mark.parametrize("num_requests", [4, 8])
def test_no_stage_waits_for_ids_where_each_has_a_batch(llm: LLM, num_requests: int) -> None:
    found = shares(llm, num_requests, 2 * (NUM_STAGES + 1))
    assert max(found) < 0.2, found  # on a quiet machine under 0.05: benchmarks/token_dependency.py


@pytest.mark.slow
def test_stages_wait_for_ids_where_one_batch_is_in_flight(llm: LLM) -> None:
    put_one_batch_in_flight(llm)
    found = shares(llm, 4, 2)
    assert min(found) > 0.5, found
