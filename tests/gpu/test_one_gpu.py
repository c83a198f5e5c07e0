"""The same models on one CUDA device as on the CPU and as in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bireme import LLM, SamplingParams
from bireme.cli import run
from bireme.engine.pool import WorkerPool
from bireme.errors import CapacityError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "shards"
    assert run(["shard", "demo", str(folder), "-tp", "3", "-pp", "2", "--quiet"]) == 0
    return folder


def test_every_family_on_a_gpu_is_that_of_transformers(check: Any, case: Path) -> None:
    check(case, "float32", reference="transformers", num_decode=16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_demo_model_on_a_gpu_is_that_of_transformers(check: Any, dtype: str) -> None:
    check("demo", dtype, reference="transformers")


def test_an_artifact_of_six_ranks_loads_onto_a_gpu(check: Any, artifact: Path) -> None:
    check(artifact, "float32", name="demo, sharded tp 3 x pp 2")


def test_text_on_a_gpu_is_that_on_a_cpu(pool: WorkerPool, artifact: Path) -> None:
    params = [
        SamplingParams(temperature=0, max_tokens=16, ignore_eos=True),
        SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_tokens=16, ignore_eos=True),
        SamplingParams(temperature=1.1, top_k=20, seed=6, max_tokens=16, ignore_eos=True),
    ]
    found = []
    for device in ("cpu", "cuda"):
        with LLM(str(artifact), device=device, dtype="float32", pool=pool) as llm:
            outputs = llm.generate([[0, 50, 60, 70]] * len(params), params)
            found.append([output.outputs[0].token_ids for output in outputs])
    assert found[0] == found[1]


def test_more_ranks_than_gpus_are_refused() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(CapacityError, match=f"{count} are here"):
        LLM("demo", pipeline_parallel_size=min(8, count + 1), device="cuda")


def test_a_trace_of_a_gpu_holds_its_steps(pool: WorkerPool) -> None:
    with LLM("demo", device="cuda", pool=pool) as llm:
        llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        steps = [span.step_id for spans in llm.spans().values() for span in spans]
    assert set(steps) >= {0, 1, 2, 3}
