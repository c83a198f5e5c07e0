"""What ranks note of their steps when they are asked to, and nothing when they are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from bireme import LLM, SamplingParams
from bireme.engine.pool import WorkerPool
from bireme.errors import EngineError

PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
PROMPT = [[5, 6, 7, 8, 9]]


@pytest.mark.parametrize("deterministic", [False, True])
def test_layers_are_timed_in_the_steps_between_and_answers_stay(
    deterministic: bool, pool: WorkerPool
) -> None:
    """Tiles of one step add up to one time."""
    with LLM("demo", dtype="float32", pool=pool, deterministic=deterministic) as llm:
        before = llm.generate(PROMPT, PARAMS)
        llm.executor.begin_profile()
        during = llm.generate(PROMPT, PARAMS)
        (seen,) = llm.executor.end_profile()
        after = llm.generate(PROMPT, PARAMS)
        llm.executor.begin_profile()
        (nothing,) = llm.executor.end_profile()
    ids = [run[0].outputs[0].token_ids for run in (before, during, after)]
    assert ids[0] == ids[1] == ids[2]
    decodes = {one.name: one.count for one in seen.layers if one.is_decode}
    assert decodes == dict.fromkeys(("embedding", *map(str, range(8)), "head"), 3)
    assert not seen.operators
    assert not nothing.layers


def test_a_profiler_writes_one_trace_a_rank(pool: WorkerPool, tmp_path: Path) -> None:
    with LLM("demo", dtype="float32", pool=pool, tensor_parallel_size=2) as llm:
        llm.executor.begin_profile(tmp_path / "{odd} rank-{rank}.json")
        llm.generate(PROMPT, PARAMS)
        seen = llm.executor.end_profile()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "{odd} rank-0.json", "{odd} rank-1.json",
    ]  # fmt: skip
    assert all(one.operators and not one.layers for one in seen)


def test_what_has_not_begun_cannot_end(pool: WorkerPool) -> None:
    with (
        LLM("demo", dtype="float32", pool=pool) as llm,
        pytest.raises(EngineError, match="a profile was to end that had not begun"),
    ):
        llm.executor.end_profile()
