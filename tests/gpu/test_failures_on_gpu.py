"""Ranks on GPUs that die or stand still amid decode steps end as one named error, though the other's kernels wait."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from bireme import LLM, SamplingParams
from bireme.engine.pool import WorkerPool
from bireme.errors import RankError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA devices"),
]

PROMPTS = [[5, 6, 7]] * 4


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize(("tp", "pp", "victim"), [(2, 1, 1), (1, 2, 0), (1, 2, 1)])
def test_a_lost_rank_is_named_and_takes_the_other_with_it(
    pair: tuple[int, int], tp: int, pp: int, victim: int, number: signal.Signals
) -> None:
    settings = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp, "devices": pair}
    with WorkerPool() as own, LLM("demo", device="cuda", pool=own, **settings) as llm:
        llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=8))
        stream = llm.stream(PROMPTS, SamplingParams(temperature=0, max_tokens=400, ignore_eos=True))
        next(stream)
        ranks = [rank.process for rank in llm.executor._world.ranks]
        os.kill(ranks[victim].pid, number)
        with pytest.raises(RankError) as caught:
            list(stream)
        assert caught.value.rank_name == llm.plan.rank_names[victim]
        assert all(rank.poll() is not None for rank in ranks)
