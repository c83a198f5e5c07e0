"""What a rank gets of the model and of the machine."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from bireme import LLM
from bireme.checkpoint.prepared import prepare_model
from bireme.config import EngineConfig, ParallelConfig
from bireme.engine.joining import threads_per_rank
from bireme.engine.messages import Command, Join
from bireme.engine.pool import WorkerPool, World
from bireme.engine.prepare import DeviceMemory, smallest_fit
from bireme.errors import CapacityError
from bireme.models.registry import partition_layers


@pytest.mark.parametrize("is_tied", [True, False])
def test_stages_are_balanced_with_the_head_counted_and_without_the_embedding(is_tied: bool) -> None:
    """A head of two layers' size takes the place of two layers; of an embedding a step reads a few rows."""
    demo = prepare_model("demo").config
    config = dataclasses.replace(demo, vocab_size=6 * 1024, tie_word_embeddings=is_tied)
    stages = partition_layers(config, ParallelConfig.of(1, 4))
    assert [stage.last_layer - stage.first_layer for stage in stages] == [2, 2, 3, 1]


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


SHARED = DeviceMemory(16 << 30, is_shared=True)


def test_ranks_of_one_machine_share_its_memory() -> None:
    assert [SHARED.of_rank(n) for n in (1, 4)] == [16 << 30, 4 << 30]
    assert DeviceMemory(16 << 30).of_rank(4) == 16 << 30


def test_no_layout_fits_a_machine_that_the_whole_model_does_not(monkeypatch: Any) -> None:
    """Dividing 325 GiB of weights over more ranks of the same 16 GiB helps nobody."""
    monkeypatch.setattr("bireme.engine.prepare.device_memory", lambda *_: SHARED)
    config = str(Path(__file__).parents[2] / "examples" / "configs" / "opt-175b")
    for width in (1, "auto"):
        with pytest.raises(CapacityError, match=r"325.23 GiB, more than the 16.00 GiB of this"):
            LLM(config, tensor_parallel_size=width, load_format="dummy", device="cpu")


def test_a_smaller_share_of_the_machine_can_still_be_the_smallest_fit() -> None:
    model = prepare_model("demo").config
    engine = EngineConfig(dtype="float32", max_num_seqs=4, max_num_batched_tokens=256)
    fit = smallest_fit(model, engine, DeviceMemory(24 << 20))
    assert fit is not None
    assert fit.widths == (2, 2)
    assert smallest_fit(model, engine, DeviceMemory(24 << 20, is_shared=True)) is None
