"""What ranks send and sum is counted, and is the same whatever carries it."""

from __future__ import annotations

from bireme import LLM, SamplingParams
from bireme.engine.pool import WorkerPool
from bireme.engine.rank_stats import RankStats

PARAMS = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


def ranks_of_a_run(pool: WorkerPool, transport: str) -> list[RankStats]:
    with LLM(
        "demo", dtype="float32", pool=pool, transport=transport, tensor_parallel_size=(2, 1)
    ) as llm:
        llm.generate([[5, 6, 7]], PARAMS)
        executor = llm.executor
    return executor.rank_stats()  # of whole steps: every rank has left


def test_bytes_are_the_same_over_shared_memory_and_over_gloo(pool: WorkerPool) -> None:
    shared, gloo = (ranks_of_a_run(pool, transport) for transport in ("auto", "distributed"))
    for ranks in (shared, gloo):
        first, second, last = ranks
        assert first.collective_bytes == second.collective_bytes > 0
        assert last.collective_bytes == 0
        assert first.sent_bytes > 0
        assert first.received_bytes == second.received_bytes > 0
        assert first.sent_bytes == last.received_bytes
        assert last.sent_bytes == 2 * first.received_bytes
        assert min(first.collective_s, first.send_s, last.receive_s) > 0
    assert [rank.collective_bytes for rank in shared] == [rank.collective_bytes for rank in gloo]
    assert [rank.sent_bytes for rank in shared] == [rank.sent_bytes for rank in gloo]
