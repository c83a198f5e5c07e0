"""The measured pass again at other sizes of the batch, or of what a step may hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from bireme.bench.answer_times import Latencies
from bireme.bench.throughput import measure_throughput
from bireme.bench.workload import Workload
from bireme.engine.llm import LLM
from bireme.errors import RequestError
from bireme.observe.profile_records import SizePass


def check_chunks(chunks: tuple[int, ...], most: int) -> None:
    """RequestError for what the ranks have no room for."""
    for size in chunks:
        if size > most:
            raise RequestError(
                f"chunks: {size} exceeds max_num_batched_tokens={most}, for which the ranks have room; give at "
                f"most {most}, or a larger --max-num-batched-tokens"
            )


def check_batches(batches: tuple[int, ...], most: int) -> None:
    """RequestError for more requests than can be at work at once."""
    for size in batches:
        if size > most:
            raise RequestError(
                f"batches: {size} exceeds max_num_seqs={most}, the requests that are at work at once; give at most "
                f"{most}, or a larger --max-num-seqs"
            )


def pass_of_batch(llm: LLM, workload: Workload, size: int) -> SizePass:
    return _measure(llm, dataclasses.replace(workload, num_prompts=size), size)


def pass_of_chunk(llm: LLM, workload: Workload, size: int) -> SizePass:
    with _at_most(llm, size):
        return _measure(llm, workload, size)


@contextmanager
def _at_most(llm: LLM, num_tokens: int) -> Iterator[None]:
    """Steps hold no more tokens meanwhile; nothing is under way when it begins and ends."""
    scheduler = llm.start().scheduler
    usual = scheduler.limits
    scheduler.limits = dataclasses.replace(usual, max_num_batched_tokens=num_tokens)
    try:
        yield
    finally:
        scheduler.limits = usual


def _measure(llm: LLM, workload: Workload, size: int) -> SizePass:
    latencies = Latencies()
    result = measure_throughput(llm, workload, seen=latencies.note)
    told = latencies.told()
    return SizePass(
        size=size,
        output_tokens_per_s=result.output_tokens_per_s,
        total_tokens_per_s=result.total_tokens_per_s,
        num_preemptions=result.num_preemptions,
        ttft_s=told.ttft_s,
        itl_s=told.itl_s,
        e2e_s=told.e2e_s,
    )
