"""What a rank gets of the model and of the machine."""

from __future__ import annotations

import dataclasses
import os

import pytest

from bireme import LLM
from bireme.checkpoint.prepared import prepare_model
from bireme.config import ParallelConfig
from bireme.engine.executor import threads_per_rank
from bireme.engine.messages import Command, Join
from bireme.engine.pool import WorkerPool, World
from bireme.models.registry import partition_layers


@pytest.mark.parametrize("is_tied", [True, False])
def test_stages_are_balanced_with_the_embedding_and_the_head_counted(is_tied: bool) -> None:
    """An embedding, or a head, of two layers' size takes the place of two layers."""
    demo = prepare_model("demo").config
    config = dataclasses.replace(demo, vocab_size=6 * 1024, tie_word_embeddings=is_tied)
    stages = partition_layers(config, ParallelConfig.of(1, 4))
    assert [stage.last_layer - stage.first_layer for stage in stages] == [1, 3, 3, 1]


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    assert [threads_per_rank(num_ranks) for num_ranks in (1, 2, 3, 8, 16)] == [8, 4, 2, 1, 1]


def test_each_rank_is_told_its_share_of_the_cores(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(6)))
    told, send = [], World.send

    def listen(world: World, index: int, command: Command) -> None:
        if isinstance(command, Join):
            told.append(command.num_threads)
        send(world, index, command)

    monkeypatch.setattr(World, "send", listen)
    with LLM("demo", tensor_parallel_size=2, dtype="float32", pool=pool):
        assert told == [3, 3]
