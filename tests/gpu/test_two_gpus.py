"""The same models cut over two ranks on CUDA and NCCL, against one rank and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bireme import LLM, SamplingParams
from bireme.engine.pool import WorkerPool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA devices"),
]

LAYOUTS = [(1, 2), (2, 1)]
LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
}  # fmt: skip

two_ranks = pytest.mark.parametrize(("tp", "pp"), LAYOUTS)


@two_ranks
def test_every_family_on_two_ranks_is_that_on_one(
    check: Any, case: Path, pair: tuple[int, int], tp: int, pp: int
) -> None:
    """In float32: these models are scaled to amplify errors, rounding to bfloat16 included."""
    check(case, "float32", tp=tp, pp=pp, devices=pair, num_decode=16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@two_ranks
def test_the_demo_model_on_two_ranks_is_that_on_one(
    check: Any, pair: tuple[int, int], tp: int, pp: int, dtype: str
) -> None:
    check("demo", dtype, tp=tp, pp=pp, devices=pair)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@two_ranks
def test_a_1b_shape_on_two_ranks_is_that_on_one(
    check: Any, pair: tuple[int, int], tmp_path: Path, tp: int, pp: int, dtype: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_1B))
    check(tmp_path, dtype, tp=tp, pp=pp, devices=pair, load_format="dummy", name="llama-1.1b-shape")


def test_the_demo_model_on_two_ranks_is_that_of_transformers(
    check: Any, pair: tuple[int, int]
) -> None:
    check("demo", "float32", tp=2, devices=pair, reference="transformers")


def test_ranks_take_the_devices_that_they_are_given(
    pool: WorkerPool, pair: tuple[int, int]
) -> None:
    given = pair[::-1]
    with LLM("demo", tensor_parallel_size=2, devices=given, device="cuda", pool=pool) as llm:
        assert llm.plan.devices == tuple(f"cuda:{index}" for index in given)
        assert llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=4))[0].finished


def test_sampled_text_of_two_ranks_on_gpus_is_that_of_a_cpu(
    pool: WorkerPool, pair: tuple[int, int]
) -> None:
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_tokens=16, ignore_eos=True)
    found = []
    for settings in ({"device": "cpu"}, {"device": "cuda", "devices": pair}):
        width = len(settings.get("devices", (0,)))
        with LLM("demo", tensor_parallel_size=width, dtype="float32", pool=pool, **settings) as llm:
            found.append(llm.generate([[0, 50, 60, 70]], params)[0].outputs[0].token_ids)
    assert found[0] == found[1]
