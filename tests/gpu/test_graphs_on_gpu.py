"""CUDA graphs give what the same kernels give when they are launched one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bireme import LLM, SamplingParams
from bireme.engine.graphs import _LARGE_STEP, _MANY_SINGLES
from bireme.engine.pool import WorkerPool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA devices"),
]
# of prompts, and of answers
LENGTHS = [(3, 40), (50, 7), (17, 25), (1, 33), (80, 2), (400, 12)]
SHORT_LENGTHS = [*LENGTHS[:-1], (83, 12)]  # of models for 96 tokens
DRAWS: list[dict[str, float]] = [
    {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.0}, {"temperature": 0},
    {"temperature": 1.2, "top_k": 20, "min_p": 0.01}, {"temperature": 0.7, "top_k": 5, "top_p": 0.8},
]  # fmt: skip
Answers = list[tuple[list[int], list[float]]]


def answers(
    model: Path | str,
    pool: WorkerPool,
    lengths: Sequence[tuple[int, int]],
    *,
    has_logprobs: bool,
    tells_prompts: bool = False,
    draws: Sequence[dict[str, float]] = ({"temperature": 0},),
    **settings: object,
) -> Answers:
    """Ids, and their log-probabilities where they are asked for, of requests that run together."""
    prompts = [[5 + index % 40 for index in range(size)] for size, _ in lengths]
    params = [
        SamplingParams(
            **draws[index % len(draws)],  # type: ignore[arg-type]
            seed=index,
            max_tokens=count,
            ignore_eos=True,
            logprobs=0 if has_logprobs else None,
            prompt_logprobs=0 if tells_prompts else None,
        )
        for index, (_, count) in enumerate(lengths)
    ]
    with LLM(str(model), pool=pool, device="cuda", **{"dtype": "float32", **settings}) as llm:
        outputs = [one for output in llm.generate(prompts, params) for one in output.outputs]
    return [
        (one.token_ids, [place[id_].logprob for place, id_ in zip(one.logprobs or [], one.token_ids, strict=False)])
        for one in outputs
    ]  # fmt: skip


def compare(
    model: Path | str,
    pool: WorkerPool,
    lengths: Sequence[tuple[int, int]] = LENGTHS,
    **layout: object,
) -> None:
    told = answers(model, pool, lengths, has_logprobs=True, **layout)
    launched = answers(model, pool, lengths, has_logprobs=True, enforce_eager=True, **layout)
    for (ids, logprobs), (other_ids, others) in zip(told, launched, strict=True):
        assert ids == other_ids
        assert logprobs == pytest.approx(others, abs=2e-4)
    # the last layer makes all rows, and not those alone that are sampled
    whole = answers(model, pool, lengths, has_logprobs=True, tells_prompts=True, **layout)
    for (ids, logprobs), (other_ids, others) in zip(told, whole, strict=True):
        assert ids == other_ids
        assert logprobs == pytest.approx(others, abs=2e-4)
    quiet = answers(model, pool, lengths, has_logprobs=False, **layout)  # chosen in a graph too
    assert [ids for ids, _ in quiet] == [ids for ids, _ in told]


@pytest.mark.parametrize("widths", [(1,), (2,), (1, 1)])
def test_every_layout(widths: tuple[int, ...], pool: WorkerPool, pair: tuple[int, int]) -> None:
    compare(
        "demo", pool, tensor_parallel_size=widths[0], pipeline_parallel_size=len(widths),
        devices=pair[: sum(widths)],
    )  # fmt: skip


@pytest.mark.parametrize(("draws", "max_num_seqs"), [(DRAWS[1:3], 8), (DRAWS, 8), (DRAWS, 2)])
@pytest.mark.parametrize("widths", [(1,), (2,), (1, 1)])
def test_draws(
    draws: Sequence[dict[str, float]],
    max_num_seqs: int,
    widths: tuple[int, ...],
    pool: WorkerPool,
    pair: tuple[int, int],
) -> None:
    """Where slots are few, requests of other kinds take them one after another."""
    compare(
        "demo", pool, tensor_parallel_size=widths[0], pipeline_parallel_size=len(widths),
        devices=pair[: sum(widths)], draws=draws, max_num_seqs=max_num_seqs,
    )  # fmt: skip


@pytest.mark.parametrize("widths", [(1,), (2,), (1, 1)])
def test_kernels_that_stream_weights(
    widths: tuple[int, ...], pool: WorkerPool, pair: tuple[int, int]
) -> None:
    """They are of elements of 16 bits."""
    layout = {
        "tensor_parallel_size": widths[0], "pipeline_parallel_size": len(widths),
        "devices": pair[: sum(widths)], "dtype": "bfloat16",
    }  # fmt: skip
    told = answers("demo", pool, LENGTHS, has_logprobs=True, **layout)
    launched = answers("demo", pool, LENGTHS, has_logprobs=True, enforce_eager=True, **layout)
    for (ids, logprobs), (other_ids, others) in zip(told, launched, strict=True):
        assert ids == other_ids
        assert logprobs == pytest.approx(others, abs=3e-2)
    # of all rows of a prompt, and of the sampled one alone, products come of different kernels
    whole = answers("demo", pool, LENGTHS, has_logprobs=True, tells_prompts=True, **layout)
    exact = answers("demo", pool, LENGTHS, has_logprobs=True, **{**layout, "dtype": "float32"})
    for rounded in (told, whole):
        for (ids, logprobs), (exact_ids, exact_logprobs) in zip(rounded, exact, strict=True):
            assert ids[0] == exact_ids[0]
            # the most that 16 bits cost these on a CPU is 0.085
            assert logprobs[0] == pytest.approx(exact_logprobs[0], abs=0.1)


def test_nothing_is_compiled_amid_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that begins with an empty cache of kernels."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compiled() -> set[str]:
        return {path.parent.name for path in tmp_path.glob("*/*.cubin")}

    with LLM("demo", device="cuda", dtype="bfloat16", max_num_seqs=40) as llm:
        llm.start()
        before = compiled()
        assert before
        for count in (1, 2, 3, 5, 17, 40):
            prompts = [[5 + row] * (400 if row == 1 else 1 + 7 * row % 90) for row in range(count)]
            params = [
                SamplingParams(**DRAWS[row % len(DRAWS)], seed=row, max_tokens=3 + row)  # type: ignore[arg-type]
                for row in range(count)
            ]
            llm.generate(prompts, params)
            assert compiled() == before, count


def test_every_family(case: Path, pool: WorkerPool) -> None:
    compare(case, pool, SHORT_LENGTHS)


def test_steps_that_are_too_large_for_their_many_single_tokens(pool: WorkerPool) -> None:
    lengths = [*[(3, 20)] * (_MANY_SINGLES + 8), (900, 5), (900, 5)]
    limits = {"max_num_batched_tokens": _LARGE_STEP + 188, "max_num_seqs": len(lengths)}
    compare("demo", pool, lengths, **limits)
