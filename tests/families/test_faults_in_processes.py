"""`verify` sees faults that are planted in real rank processes, over the transport that they use.

The fault is a `sitecustomize.py`: each process of a pool of its own runs it before the worker is
imported, this process never does.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zoo
from harness import engine_config

from bireme.checkpoint.prepared import PreparedModel, prepare_model
from bireme.engine.pool import WorkerPool
from bireme.verify import Certificate, verify

Verify = Callable[[str], Certificate]
MODEL: PreparedModel = prepare_model("demo")

NO_FAULT = ""
AN_ALL_REDUCE_DROPPED = """
    from bireme.parallel.layers import RowParallelLinear
    from bireme.parallel.shm import CompiledGroup, ShmGroup

    whole_forward = RowParallelLinear.forward
    whole_sums = {group: group.all_reduce for group in (CompiledGroup, ShmGroup)}

    def forward(self, x):
        is_faulty = self.layouts["weight"].name == "model.layers.1.self_attn.o_proj.weight"
        for group, whole_sum in whole_sums.items():
            group.all_reduce = (lambda group, addend: addend) if is_faulty else whole_sum
        return whole_forward(self, x)

    RowParallelLinear.forward = forward
"""
STAGES_IN_ANOTHER_ORDER = """
    from dataclasses import replace
    from bireme.parallel import pipeline

    whole = pipeline.stage_specs

    def stage_specs(layers_per_stage, num_layers):
        specs = whole(layers_per_stage, num_layers)
        return tuple(
            replace(spec, first_layer=other.first_layer, last_layer=other.last_layer)
            for spec, other in zip(specs, reversed(specs), strict=True)
        )

    pipeline.stage_specs = stage_specs
"""


@pytest.fixture
def verify_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Verify]:
    """Verifies the demo model, two ranks on each of two stages, in processes that have a fault."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    prompts = zoo.prompts(vocab=MODEL.config.vocab_size)
    with WorkerPool() as own:

        def verify_it(fault: str) -> Certificate:
            (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(fault))
            return verify(MODEL, engine_config(2, 2), prompts, num_decode=2, pool=own)

        yield verify_it


def test_processes_that_are_started_like_this_are_whole_without_a_fault(
    verify_with: Verify,
) -> None:
    assert verify_with(NO_FAULT).is_same


# and the departure that the fault makes: layer, ranks, where
@pytest.mark.parametrize(
    ("fault", "layer", "ranks", "what"),
    [
        pytest.param(AN_ALL_REDUCE_DROPPED, 1, {0, 1}, "result of .*o_proj", id="all_reduce"),
        pytest.param(STAGES_IN_ANOTHER_ORDER, 0, {2, 3}, "result of .*norm", id="stage_order"),
    ],
)
def test_verify_sees_a_fault_of_real_processes_and_names_where_it_began(
    verify_with: Verify, fault: str, layer: int, ranks: set[int], what: str
) -> None:
    found = verify_with(fault)
    assert not found.is_same
    assert found.departure is not None, found
    assert (found.departure.step, found.departure.layer) == (0, layer)
    assert found.departure.rank in ranks
    assert re.match(what, found.departure.what), found.departure
