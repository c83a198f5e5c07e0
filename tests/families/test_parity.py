"""Every family, cut every way, is transformers' model: prefill and 32 decode steps in float32."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import zoo
from harness import Checkpoints, engine_config
from safetensors import safe_open

from bireme.engine.pool import WorkerPool
from bireme.models.blocks import StageModel
from bireme.verify import verify

LAYOUTS = [
    (1,), (2,), (3,), (4,), (1, 1), (2, 2), (3, 3), (1, 1, 1, 1), (3, 2), (1, 4), (2, 1, 3),
]  # fmt: skip
# What no cut touches (a way to scale rope, a bias) is tried at every layout on threads, and at one
# on processes; one model of every family at every layout on processes.
VARIANTS = [
    "llama-biases", "llama-linear", "llama-yarn", "llama-dynamic", "phi3-longrope", "gpt2-scaled",
    "opt-350m", "opt-plain", "bloom-residual", "gpt-neox-serial",
]  # fmt: skip
FAMILIES = [name for name in zoo.CASES if name not in VARIANTS]
IN_PROCESSES = [(case, widths) for widths in LAYOUTS for case in FAMILIES]
IN_PROCESSES += [(case, (3, 2)) for case in VARIANTS]


def _name(value: object) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _assert_parity(
    checkpoints: Checkpoints,
    case: str,
    widths: tuple[int, ...],
    worst: dict[str, float],
    pool: WorkerPool | None,
) -> None:
    model, reference = checkpoints.model(case), checkpoints.reference(case)
    found = verify(model, engine_config(*widths), zoo.prompts(), reference=reference, pool=pool)
    worst[case] = max(worst.get(case, 0.0), found.relative_difference)
    assert found.num_decode_positions == zoo.NUM_DECODE * len(zoo.PROMPT_LENGTHS)
    assert found.is_same, found


@pytest.mark.parametrize(("case", "widths"), IN_PROCESSES, ids=_name)
def test_ranks_in_processes_compute_what_transformers_does(
    checkpoints: Checkpoints,
    pool: WorkerPool,
    worst: dict[str, float],
    case: str,
    widths: tuple[int, ...],
) -> None:
    _assert_parity(checkpoints, case, widths, worst, pool)


@pytest.mark.usefixtures("local_ranks")
@pytest.mark.parametrize("case", VARIANTS)
@pytest.mark.parametrize("widths", LAYOUTS, ids=_name)
def test_ranks_in_threads_compute_what_transformers_does(
    checkpoints: Checkpoints,
    worst: dict[str, float],
    case: str,
    widths: tuple[int, ...],
) -> None:
    _assert_parity(checkpoints, case, widths, worst, None)


@pytest.mark.usefixtures("local_ranks")
@pytest.mark.parametrize("case", zoo.CASES)
def test_made_up_weights_are_the_same_model_at_every_layout(
    checkpoints: Checkpoints, case: str
) -> None:
    settings = dataclasses.replace(engine_config(2, 1), load_format="dummy")
    found = verify(checkpoints.model(case), settings, zoo.prompts(), num_decode=2)
    assert found.spread > 0
    assert found.is_same, found


@pytest.mark.parametrize("case", zoo.CASES)
def test_a_test_models_logits_spread_and_its_greedy_output_varies(
    checkpoints: Checkpoints, case: str
) -> None:
    reference = checkpoints.reference(case)
    for ids, num_prompt, logits in zip(
        reference.sequences.ids, reference.sequences.num_prompt, reference.logits, strict=True
    ):
        assert logits.std() >= 1
        assert len(set(ids[num_prompt:])) >= 3


@pytest.mark.parametrize(
    ("case", "names"),
    [
        (
            "mixtral",
            [
                "block_sparse_moe.gate",
                "block_sparse_moe.experts.4.w1",
                "block_sparse_moe.experts.0.w2",
            ],
        ),
        ("qwen3-moe", ["mlp.gate", "mlp.experts.5.gate_proj", "mlp.experts.0.down_proj"]),
    ],
)
def test_the_files_spell_experts_as_on_the_hub(
    checkpoints: Checkpoints, case: str, names: list[str]
) -> None:
    with safe_open(checkpoints.model(case).folder / "model.safetensors", "pt") as file:
        assert {f"model.layers.1.{name}.weight" for name in names} <= set(file.keys())


@pytest.mark.usefixtures("local_ranks")
@pytest.mark.parametrize("case", zoo.CASES)
def test_a_workspace_of_a_few_places_changes_nothing(checkpoints: Checkpoints, case: str) -> None:
    """So small that every prompt is split and hardly two sequences are attended to together."""
    settings = dataclasses.replace(engine_config(3, 2), workspace_bytes=2048)
    reference = checkpoints.reference(case)
    found = verify(checkpoints.model(case), settings, zoo.prompts(), reference=reference)
    assert found.is_same, found


@pytest.mark.usefixtures("local_ranks")
@pytest.mark.parametrize("case", ["llama2", "qwen3", "phi3", "mixtral", "qwen3-moe"])
@pytest.mark.parametrize("widths", [(1,), (3,), (2, 2)], ids=_name)
def test_sums_that_the_next_norm_takes(
    checkpoints: Checkpoints,
    worst: dict[str, float],
    case: str,
    widths: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As layers do on GPUs."""
    monkeypatch.setattr("bireme.engine.model_runner.has_kernels", lambda _device: True)
    seen, handed_on = [], StageModel._unsummed

    def noted(*given: Any) -> torch.Tensor:
        seen.append(given)
        return handed_on(*given)

    monkeypatch.setattr(StageModel, "_unsummed", noted)
    _assert_parity(checkpoints, case, widths, worst, None)
    assert seen
