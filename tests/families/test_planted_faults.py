"""`verify` sees each of five faults of distributed inference, and names where it began.

Faults are planted in ranks that run as threads, by changing the functions that those ranks call;
the uncut model beside them stays whole.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from itertools import count

import local_world
import pytest
import torch
import zoo
from harness import Checkpoints, engine_config
from local_world import LocalExecutor

import bireme.verify.comparison
from bireme.checkpoint.prepared import PreparedModel, prepare_model
from bireme.engine.executor import WorkerPlan
from bireme.parallel.cuts import HeadCut
from bireme.parallel.layers import RowParallelLinear, named_layouts
from bireme.parallel.pipeline import StageSpec
from bireme.verify import Certificate, verify
from thread_group import ThreadGroup

Fault = Callable[[pytest.MonkeyPatch], None]
ATTENTION_OUT = r"self_attn\.o_proj|attn\.c_proj|attention\.dense"
MLP = r"mlp\.(gate_up|c_fc|dense_h_to_4h)"
CASES = ["llama-biases", "qwen3", "gpt2", "bloom", "gpt-neox"]


def _drop_an_all_reduce(patch: pytest.MonkeyPatch) -> None:
    """Layer 1 of 4 keeps its own addend after attention: the 4th of the 9 sums of a step."""
    whole, calls = ThreadGroup.all_reduce, {}  # type: ignore[var-annotated]

    def all_reduce(self: ThreadGroup, x: torch.Tensor) -> torch.Tensor:
        number = next(calls.setdefault(self, count()))
        return x if number % 9 == 3 else whole(self, x)

    patch.setattr(ThreadGroup, "all_reduce", all_reduce)


class _Swapped(LocalExecutor):
    """The ranks of a cut model got each other's slice of the first MLP matrix of layer 2, or of its
    experts."""

    def __init__(self, plan: WorkerPlan, pool: object = None) -> None:
        super().__init__(plan, pool)
        if len(self.runners) == 1:
            return
        first, second = (
            {
                name: (module, attribute)
                for name, module, attribute, _ in named_layouts(runner.model)
            }
            for runner in self.runners
        )
        name = next(
            name for name in first if name in ("layers.2.mlp.up.weight", "layers.2.mlp.gate_up")
        )
        (module, attribute), (other, _) = first[name], second[name]
        mine = getattr(module, attribute)
        setattr(module, attribute, getattr(other, attribute))
        setattr(other, attribute, mine)


def _swap_two_ranks_slices(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(bireme.verify.comparison, "WorkerExecutor", _Swapped)


def _shift_the_kv_head(patch: pytest.MonkeyPatch) -> None:
    """Query heads of rank 1 read the next KV head."""
    whole = HeadCut.head_map.fget  # type: ignore[attr-defined]

    def head_map(self: HeadCut) -> tuple[int, ...]:
        shift = self.queries[0] > 0
        return tuple((kv + shift) % self.num_local_kv_heads for kv in whole(self))

    patch.setattr(HeadCut, "head_map", property(head_map))


def _add_the_row_bias_on_every_rank(patch: pytest.MonkeyPatch) -> None:
    def forward(self: RowParallelLinear, x: torch.Tensor) -> torch.Tensor:
        addend = self.partial(x)
        return self.mesh.tensor.all_reduce(addend + self.bias if "bias" in self.layouts else addend)

    patch.setattr(RowParallelLinear, "forward", forward)


def _change_the_stage_order(patch: pytest.MonkeyPatch) -> None:
    """Stages take each other's layers; the ends of the model stay where they were."""
    whole = local_world.stage_specs

    def stage_specs(layers_per_stage: tuple[int, ...], num_layers: int) -> tuple[StageSpec, ...]:
        specs = whole(layers_per_stage, num_layers)
        return tuple(
            StageSpec(
                spec.stage, other.first_layer, other.last_layer, spec.has_embedding, spec.has_head
            )
            for spec, other in zip(specs, reversed(specs), strict=True)
        )

    patch.setattr(local_world, "stage_specs", stage_specs)


def _verify_rounded(model: PreparedModel, dtype: str, widths: tuple[int, ...]) -> Certificate:
    config = dataclasses.replace(engine_config(*widths), dtype=dtype)
    prompts = zoo.prompts(vocab=model.config.vocab_size)
    return verify(model, config, prompts, num_decode=4)


def _verify(checkpoints: Checkpoints, case: str, *widths: int) -> Certificate:
    model, reference = checkpoints.model(case), checkpoints.reference(case, num_decode=2)
    return verify(model, engine_config(*widths), zoo.prompts(), reference=reference)


# fault, widths, and the departure that it makes: layer, rank, what, module
FAULTS = [
    (_drop_an_all_reduce, (2,), (1, 0, "result of", ATTENTION_OUT)),
    (_swap_two_ranks_slices, (2,), (2, 0, "result of", MLP)),
    (_shift_the_kv_head, (2,), (0, 1, "input of", ATTENTION_OUT)),
    (_add_the_row_bias_on_every_rank, (2,), (0, 0, "result of", ATTENTION_OUT)),
    (_change_the_stage_order, (1, 1), (0, 1, "result of", "norm|ln_1")),
]


PLANTED = [
    pytest.param(case, *fault, id=f"{case}{fault[0].__name__}")
    for case in CASES
    for fault in FAULTS
    if (case, fault[0]) != ("qwen3", _add_the_row_bias_on_every_rank)  # it has none
]


@pytest.mark.usefixtures("local_ranks")
@pytest.mark.parametrize(("case", "fault", "widths", "departure"), PLANTED)
def test_verify_sees_a_planted_fault_and_names_where_it_began(
    checkpoints: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    fault: Fault,
    widths: tuple[int, ...],
    departure: tuple[int, int, str, str],
) -> None:
    fault(monkeypatch)
    found = _verify(checkpoints, case, *widths)
    assert not found.is_same
    assert found.departure is not None, found
    layer, rank, what, module = departure
    assert (found.departure.step, found.departure.layer, found.departure.rank) == (0, layer, rank)
    assert re.match(rf"{what} .*({module})", found.departure.what), found.departure


@pytest.mark.usefixtures("local_ranks")
def test_verify_names_the_layer_whose_experts_are_wrong(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    _swap_two_ranks_slices(monkeypatch)
    found = _verify(checkpoints, "mixtral", 2)
    assert not found.is_same
    assert found.departure is not None
    assert (found.departure.layer, found.departure.what) == (
        2,
        "result of model.layers.2.block_sparse_moe.experts.gate_up",
    )


@pytest.mark.usefixtures("local_ranks")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("case", "fault", "widths", "departure"), PLANTED)
def test_verify_sees_a_planted_fault_through_the_rounding_of_sixteen_bits(
    checkpoints: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    fault: Fault,
    widths: tuple[int, ...],
    departure: tuple[int, int, str, str],
    dtype: str,
) -> None:
    fault(monkeypatch)
    assert not _verify_rounded(checkpoints.model(case), dtype, widths).is_same


@pytest.mark.usefixtures("local_ranks")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("fault", "widths"),
    [fault[:2] for fault in FAULTS if fault[0] != _add_the_row_bias_on_every_rank],
)
def test_verify_sees_a_planted_fault_of_a_real_model_through_that_rounding(
    monkeypatch: pytest.MonkeyPatch, fault: Fault, widths: tuple[int, ...], dtype: str
) -> None:
    fault(monkeypatch)
    assert not _verify_rounded(prepare_model("demo"), dtype, widths).is_same


@pytest.mark.usefixtures("local_ranks")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", zoo.CASES)
def test_what_rounding_alone_changes_is_the_same_model(
    checkpoints: Checkpoints, case: str, dtype: str
) -> None:
    found = _verify_rounded(checkpoints.model(case), dtype, (3, 2))
    assert found.is_same, found
