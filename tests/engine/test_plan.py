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
from bireme.engine.pool import WorkerPool
from bireme.engine.prepare import DeviceMemory, smallest_fit
from bireme.engine.world import World
from bireme.errors import CapacityError
from bireme.model_config import ModelConfig
from bireme.models.registry import partition_layers


def layers_per_stage(config: ModelConfig, num_stages: int) -> list[int]:
    stages = partition_layers(config, ParallelConfig.of(1, num_stages))
    return [stage.last_layer - stage.first_layer for stage in stages]


@pytest.mark.parametrize("is_tied", [True, False])
def test_stages_read_alike_as_far_as_they_hold_alike(is_tied: bool) -> None:
    """Of an embedding of two layers' size a step reads a few rows, but the fullest stage must hold no more than a
    tenth above the least that is possible; a head of that size is read as two layers."""
    demo = prepare_model("demo").config
    config = dataclasses.replace(demo, vocab_size=6 * 1024, tie_word_embeddings=is_tied)
    assert layers_per_stage(config, 4) == [1, 3, 3, 1]
    deeper = dataclasses.replace(config, num_layers=32, windows=(None,) * 32)
    assert layers_per_stage(deeper, 2) == [17, 15]
    assert layers_per_stage(deeper, 3) == [11, 11, 10]
    assert layers_per_stage(deeper, 4) == [7, 9, 9, 7]


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
