"""The same models on CUDA and NCCL: two GPUs against one, and against transformers.

Run with `scripts/test -m gpu`. BIREME_GPU_RESULTS names a file that takes the certificates with
the hardware, the versions and the commit; the last one is kept under benchmarks/results/.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bireme import LLM, SamplingParams, __version__
from bireme.config import EngineConfig, ParallelConfig
from bireme.engine.pool import WorkerPool
from bireme.engine.prepare import prepare_model
from bireme.errors import CapacityError
from bireme.verify import verify
from families import zoo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

LAYOUTS = [(1, 2), (2, 1)]
LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
}  # fmt: skip


def _commit() -> str:
    given = os.environ.get("BIREME_COMMIT")
    if given:
        return given
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


@pytest.fixture(scope="module")
def certificates() -> Iterator[list[dict[str, Any]]]:
    found: list[dict[str, Any]] = []
    yield found
    path = os.environ.get("BIREME_GPU_RESULTS")
    if path:
        environment = {
            "gpus": [
                torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
            ],
            "bireme": __version__,
            "commit": _commit(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "python": platform.python_version(),
            "command": "scripts/test -m gpu",
        }
        Path(path).write_text(
            json.dumps({"environment": environment, "certificates": found}, indent=1) + "\n"
        )


def check(
    certificates: list[dict[str, Any]],
    model: str,
    name: str,
    pool: WorkerPool,
    tp: int,
    pp: int,
    dtype: str,
    **more: Any,
) -> None:
    settings = {key: more.pop(key) for key in ("load_format",) if key in more}
    config = EngineConfig(
        parallel=ParallelConfig.of(tp, pp), device="cuda", dtype=dtype, **settings
    )
    prepared = prepare_model(model, needs_weights=not settings)
    prompts = more.pop("prompts", zoo.prompts(prepared.config.vocab_size))
    certificate = verify(prepared, config, prompts, pool=pool, **more)
    certificates.append(asdict(certificate) | {"model": name})
    assert certificate.is_same, certificate
    assert certificate.device == "cuda"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_the_demo_model_on_two_gpus_is_that_on_one(
    certificates: list[dict[str, Any]], pool: WorkerPool, tp: int, pp: int, dtype: str
) -> None:
    check(certificates, "demo", "demo", pool, tp, pp, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_a_1b_shape_on_two_gpus_is_that_on_one(
    certificates: list[dict[str, Any]],
    pool: WorkerPool,
    tmp_path: Path,
    tp: int,
    pp: int,
    dtype: str,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_1B))
    check(certificates, str(tmp_path), "llama-1.1b-shape", pool, tp, pp, dtype, load_format="dummy")


@pytest.fixture(scope="module", params=list(zoo.CASES))
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("zoo") / request.param
    return request.param, zoo.write(zoo.CASES[request.param], folder)


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_every_family_on_two_gpus_is_that_on_one(
    certificates: list[dict[str, Any]], pool: WorkerPool, case: tuple[str, Path], tp: int, pp: int
) -> None:
    """In float32: these models are scaled to amplify errors, rounding to bfloat16 included."""
    check(certificates, str(case[1]), case[0], pool, tp, pp, "float32", num_decode=16)


def test_the_demo_model_on_two_gpus_is_that_of_transformers(
    certificates: list[dict[str, Any]], pool: WorkerPool
) -> None:
    check(certificates, "demo", "demo", pool, 2, 1, "float32", reference="transformers")


def test_ranks_take_the_devices_that_they_are_given(pool: WorkerPool) -> None:
    with LLM("demo", tensor_parallel_size=2, devices=(1, 0), device="cuda", pool=pool) as llm:
        assert llm.plan.devices == ("cuda:1", "cuda:0")
        assert llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=4))[0].finished


def test_more_ranks_than_gpus_are_refused() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(CapacityError, match=f"{count} are here"):
        LLM("demo", pipeline_parallel_size=min(8, count + 1), device="cuda")


def test_sampled_text_on_gpus_is_that_on_cpus(pool: WorkerPool) -> None:
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_tokens=16, ignore_eos=True)
    found = []
    for device, tp in (("cpu", 1), ("cuda", 2)):
        with LLM("demo", tensor_parallel_size=tp, device=device, dtype="float32", pool=pool) as llm:
            found.append(llm.generate([[0, 50, 60, 70]], params)[0].outputs[0].token_ids)
    assert found[0] == found[1]
