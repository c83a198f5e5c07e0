"""The engine on a CUDA device: exact in a crowd, structured, with log-probabilities."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from bireme import LLM, RequestOutput, SamplingParams, StructuredOutputsParams
from bireme.engine.pool import WorkerPool
from families import zoo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = [[7 + index, *range(40, 40 + 9 * index)] for index in range(6)]


def greedy(**more: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, **more)  # type: ignore[arg-type]


def features() -> list[SamplingParams]:
    return [
        greedy(repetition_penalty=1.3, logprobs=3, prompt_logprobs=2),
        greedy(frequency_penalty=0.7, presence_penalty=0.2, logit_bias={70: 4.0}),
        SamplingParams(temperature=0.9, min_p=0.05, seed=4, max_tokens=24, min_tokens=20),
        SamplingParams(temperature=1.0, top_p=0.9, top_k=40, seed=5, max_tokens=24),
        SamplingParams(
            temperature=1.0, seed=6, max_tokens=60,
            structured_outputs=StructuredOutputsParams(json={"enum": ["red", "green", [1, 2]]}),
        ),
    ]  # fmt: skip


def logprobs(output: RequestOutput) -> list[dict[int, float]]:
    found = output.outputs[0].logprobs
    assert found is not None
    return [{id_: item.logprob for id_, item in place.items()} for place in found]


@pytest.mark.parametrize(
    ("widths", "dtype"),
    [((1,), "float32"), ((1,), "float16"), *((w, "bfloat16") for w in ((1,), (2,), (1, 1)))],
)
def test_deterministic_logits_do_not_depend_on_the_crowd(
    widths: tuple[int, ...], dtype: str, pool: WorkerPool, request: pytest.FixtureRequest
) -> None:
    num_ranks = sum(widths)
    devices = request.getfixturevalue("pair") if num_ranks > 1 else (0,)
    check_exactness(
        "demo", PROMPTS, dtype=dtype, pool=pool, devices=devices, tensor_parallel_size=widths[0],
        pipeline_parallel_size=len(widths),
    )  # fmt: skip


@pytest.mark.parametrize("case", ["mistral", "gemma2", "phi3-longrope", "bloom", "mixtral"])
def test_so_it_is_with_windows_experts_alibi_and_long_rope(
    case: str, pool: WorkerPool, tmp_path: Path
) -> None:
    model = zoo.write(zoo.CASES[case], tmp_path / case)
    prompts = [[7 + index, *range(20, 20 + 9 * index)] for index in range(6)]
    check_exactness(str(model), prompts, dtype="bfloat16", pool=pool)


def check_exactness(model: str, prompts: list[list[int]], **asked: Any) -> None:
    """Of logits, in a crowd and alone, in small steps, behind a cached prefix, and without graphs."""
    params = greedy(logprobs=5)
    asked |= {"device": "cuda", "deterministic": True, "max_num_seqs": 4}
    with LLM(model, max_num_batched_tokens=17, **asked) as llm:
        together = llm.generate([*prompts, *prompts], params)
        alone = [llm.generate([prompt], params)[0] for prompt in prompts]
        assert llm.start().scheduler.num_prefix_hits > 0
    with LLM(model, enforce_eager=True, **asked) as llm:
        together += llm.generate(prompts, params)
    for crowd, single in zip(together, alone * 3, strict=True):
        assert crowd.outputs[0].token_ids == single.outputs[0].token_ids
        for mine, theirs in zip(logprobs(crowd), logprobs(single), strict=True):
            # a logit that differs in its last bit would show; float64 sums of other shapes do not
            assert mine == pytest.approx(theirs, abs=1e-11)


def test_sampling_features_choose_on_a_gpu_as_on_a_cpu(pool: WorkerPool) -> None:
    params = features()
    found = []
    for device in ("cpu", "cuda"):
        with LLM("demo", device=device, dtype="float32", pool=pool) as llm:
            found.append(llm.generate(PROMPTS[: len(params)], params))
    for cpu, cuda in zip(*found, strict=True):
        assert cpu.outputs[0].token_ids == cuda.outputs[0].token_ids
    for mine, theirs in zip(logprobs(found[0][0]), logprobs(found[1][0]), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(abs(mine[id_] - theirs[id_]) < 1e-3 for id_ in mine)
    assert json.loads(found[1][4].outputs[0].text) in ["red", "green", [1, 2]]


@pytest.mark.parametrize("widths", [(1,), (2,), (1, 1)])
def test_the_host_waits_for_no_step(
    widths: tuple[int, ...], pool: WorkerPool, pair: tuple[int, int], tmp_path: Path
) -> None:
    params = [*features(), greedy()]
    with LLM(
        "demo", device="cuda", dtype="bfloat16", pool=pool, tensor_parallel_size=widths[0],
        pipeline_parallel_size=len(widths), devices=pair[: sum(widths)],
        max_num_batched_tokens=17, max_num_seqs=4,
    ) as llm:  # fmt: skip
        llm.generate(PROMPTS, params)
        llm.executor.begin_profile(tmp_path / "rank-{rank}.json")
        llm.generate(PROMPTS, params)
        llm.executor.end_profile()
    for rank in range(sum(widths)):
        events = json.loads((tmp_path / f"rank-{rank}.json").read_text())["traceEvents"]
        kinds = ("gpu_memcpy", "cuda_runtime")
        seen = Counter(it["name"] for it in events if it.get("cat") in kinds)
        assert seen["cudaGraphLaunch"], "what the host calls is not in the profile"
        assert seen["Memcpy HtoD (Pinned -> Device)"] > 20, seen
        assert not [it for it in seen if "Pageable" in it or it == "cudaStreamSynchronize"], seen
