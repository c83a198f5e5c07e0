"""`LLM` end to end on real processes: the same tokens at every layout, one by one or together."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bireme import LLM, SamplingParams
from bireme.engine.pool import WorkerPool
from bireme.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    EngineError,
    RequestError,
)
from bireme.trace import SpanKind

PROMPTS = ["The with statement is", "Return a list of", "class collections.OrderedDict", "If the"]
LAYOUTS = [
    (1, 1),
    (2, 1),
    (3, 1),
    (1, 2),
    (2, 2),
    (8, 1),
    (1, 4),
    ((3, 2), None),
    ((1, 4), None),
    ((2, 1, 3), None),
]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def texts(
    pool: WorkerPool,
    params: SamplingParams,
    tp: int | tuple[int, ...],
    pp: int | None,
    **settings: Any,
) -> list[list[int]]:
    settings |= {"dtype": "float32", "pool": pool}
    with LLM("demo", tensor_parallel_size=tp, pipeline_parallel_size=pp, **settings) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params)]


@pytest.fixture(scope="module")
def greedy(pool: WorkerPool) -> list[list[int]]:
    return texts(pool, GREEDY, 1, 1)


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS, ids=str)
def test_greedy_tokens_do_not_depend_on_the_layout(
    pool: WorkerPool, greedy: list[list[int]], tp: int | tuple[int, ...], pp: int | None
) -> None:
    assert texts(pool, GREEDY, tp, pp) == greedy
    assert all(len(set(ids)) > 5 for ids in greedy)


@pytest.mark.parametrize(("tp", "pp"), [(3, 1), (2, 2), ((3, 2), None)], ids=str)
def test_ranks_that_talk_over_gloo_give_the_same_tokens(
    pool: WorkerPool, greedy: list[list[int]], tp: int | tuple[int, ...], pp: int | None
) -> None:
    assert texts(pool, GREEDY, tp, pp, transport="distributed") == greedy


def test_without_a_compiler_the_tokens_are_the_same(
    greedy: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIREME_COMPILED_HELPER", "0")
    with LLM("demo", tensor_parallel_size=2, dtype="float32") as llm:
        assert [it.outputs[0].token_ids for it in llm.generate(PROMPTS, GREEDY)] == greedy


@pytest.mark.slow
def test_sixteen_ranks_give_the_same_tokens(pool: WorkerPool, greedy: list[list[int]]) -> None:
    assert texts(pool, GREEDY, 4, 4) == greedy


def test_the_same_seed_gives_the_same_sampled_text_at_every_layout(pool: WorkerPool) -> None:
    params = SamplingParams(
        temperature=0.9, top_p=0.95, top_k=50, seed=11, max_tokens=24, ignore_eos=True
    )
    whole = texts(pool, params, 1, 1)
    assert whole != texts(
        pool, SamplingParams(temperature=0.9, seed=12, max_tokens=24, ignore_eos=True), 1, 1
    )
    for tp, pp in ((2, 2), (3, 1), (1, 4)):
        assert texts(pool, params, tp, pp) == whole


def test_a_request_alone_gets_the_tokens_that_it_gets_among_others(
    pool: WorkerPool, greedy: list[list[int]]
) -> None:
    with LLM(
        "demo", tensor_parallel_size=2, pipeline_parallel_size=2, dtype="float32", pool=pool
    ) as llm:
        assert llm.generate(PROMPTS[1], GREEDY)[0].outputs[0].token_ids == greedy[1]


def test_small_steps_and_few_slots_change_no_token(
    pool: WorkerPool, greedy: list[list[int]]
) -> None:
    with LLM(
        "demo",
        pipeline_parallel_size=2,
        dtype="float32",
        max_num_batched_tokens=3,
        max_num_seqs=2,
        pool=pool,
    ) as llm:
        outputs = llm.generate(PROMPTS, GREEDY)
    assert [output.outputs[0].token_ids for output in outputs] == greedy


def test_an_end_of_text_token_ends_a_request_and_is_not_in_its_text(pool: WorkerPool) -> None:
    with LLM("demo", dtype="float32", pool=pool) as llm:
        output = llm.chat(
            [{"role": "user", "content": "What does math.sqrt do?"}],
            SamplingParams(temperature=0, max_tokens=80),
        )[0]
    done = output.outputs[0]
    assert done.finish_reason == "stop"
    assert done.token_ids[-1] in llm.model.eos_token_ids
    assert "<|" not in done.text
    assert "square root" in done.text
    assert output.finished
    assert output.metrics is not None
    assert output.metrics.num_tokens == len(done.token_ids)


def test_stop_token_ids_end_a_request_and_are_its_reason(
    pool: WorkerPool, greedy: list[list[int]]
) -> None:
    stop = greedy[0][5]
    with LLM("demo", dtype="float32", pool=pool) as llm:
        params = SamplingParams(
            temperature=0, max_tokens=24, ignore_eos=True, stop_token_ids=(stop,)
        )
        done = llm.generate(PROMPTS[0], params)[0].outputs[0]
        shown = dataclasses.replace(params, include_stop_str_in_output=True)
        whole = llm.generate(PROMPTS[0], shown)[0].outputs[0]
        name = llm.tokenizer.name_of(stop)
    assert done.token_ids == greedy[0][: greedy[0].index(stop) + 1]
    assert (done.finish_reason, done.stop_reason) == ("stop", stop)
    assert name
    assert whole.text == done.text + name


def test_streamed_deltas_make_the_whole_output(pool: WorkerPool, greedy: list[list[int]]) -> None:
    with LLM("demo", tensor_parallel_size=2, dtype="float32", pool=pool) as llm:
        ids: dict[int, list[int]] = {}
        text: dict[int, str] = {}
        finals = {}
        for delta in llm.stream(PROMPTS, GREEDY):
            ids.setdefault(delta.index, []).extend(delta.token_ids)
            text[delta.index] = text.get(delta.index, "") + delta.text
            if delta.output is not None:
                finals[delta.index] = delta.output
    assert [ids[index] for index in range(4)] == greedy
    for index, output in finals.items():
        assert output.outputs[0].text == text[index]
        assert output.prompt == PROMPTS[index]


def test_a_stream_that_is_left_early_leaves_a_usable_engine(
    pool: WorkerPool, greedy: list[list[int]]
) -> None:
    with LLM("demo", pipeline_parallel_size=2, dtype="float32", pool=pool) as llm:
        stream = llm.stream(PROMPTS, GREEDY)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert llm.generate(PROMPTS[2], GREEDY)[0].outputs[0].token_ids == greedy[2]


def test_a_model_may_be_closed_while_a_stream_is_held(
    pool: WorkerPool, greedy: list[list[int]]
) -> None:
    llm = LLM("demo", pipeline_parallel_size=2, dtype="float32", pool=pool)
    stream = llm.stream(PROMPTS, GREEDY)
    next(stream)
    llm.close()
    stream.close()  # type: ignore[attr-defined]
    with LLM("demo", dtype="float32", pool=pool) as other:
        assert other.generate(PROMPTS[2], GREEDY)[0].outputs[0].token_ids == greedy[2]


def test_token_ids_need_no_tokenizer_file(
    pool: WorkerPool, tmp_path: Path, greedy: list[list[int]]
) -> None:
    from bireme.checkpoint.hub import resolve_model
    from bireme.text.tokenizer import Tokenizer

    demo = resolve_model("demo")
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (tmp_path / name).symlink_to(demo / name)
    ids = Tokenizer(demo).encode(PROMPTS[0])
    with LLM(tmp_path, dtype="float32", pool=pool) as llm:
        output = llm.generate([ids], GREEDY)[0]
        assert output.outputs[0].token_ids == greedy[0]
        assert output.outputs[0].text == ""
        with pytest.raises(CheckpointError, match=r"no tokenizer\.json; give token ids"):
            llm.generate("text", GREEDY)


def test_dummy_weights_are_the_same_model_at_every_layout(pool: WorkerPool, tmp_path: Path) -> None:
    from bireme.checkpoint.hub import resolve_model

    config = json.loads((resolve_model("demo") / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"dtype": "float32", "torch_dtype": "float32"})
    )
    found = []
    for tp, pp in ((1, 1), (3, 2)):
        with LLM(
            tmp_path,
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            load_format="dummy",
            pool=pool,
        ) as llm:
            found.append(llm.generate([[5, 6, 7, 8]], GREEDY)[0].outputs[0].token_ids)
    assert found[0] == found[1]
    assert len(set(found[0])) > 5


def test_every_rank_writes_spans_and_the_trace_has_a_track_for_each(
    pool: WorkerPool, tmp_path: Path
) -> None:
    with LLM(
        "demo", tensor_parallel_size=2, pipeline_parallel_size=2, dtype="float32", pool=pool
    ) as llm:
        llm.generate(PROMPTS[0], GREEDY)
        llm.write_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {
        event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"
    }
    assert list(names.values()) == [*llm.plan.rank_names, "engine"]
    for track, name in names.items():
        kinds = {event["name"] for event in events if event["tid"] == track}
        of_rank = {"step", "compute", "all_reduce", "load", "send", "recv"}
        assert kinds >= ({"submit", "wait"} if name == "engine" else of_rank)


def test_auto_takes_the_smallest_width_that_fits(pool: WorkerPool) -> None:
    limits = {"dtype": "float32", "max_num_batched_tokens": 256, "pool": pool}
    with LLM("demo", tensor_parallel_size="auto", memory_limit_bytes=50 << 20, **limits) as llm:
        assert llm.config.parallel.widths == (2,)
    with pytest.raises(CapacityError, match="does not fit"):
        LLM("demo", tensor_parallel_size="auto", memory_limit_bytes=1 << 20, **limits)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"tensor_parallel_size": 9}, ConfigError, "exceeds the 8 query heads; use at most 8"),
        ({"pipeline_parallel_size": 9}, ConfigError, "exceeds the 8 layers; use at most 8"),
        ({"layers_per_stage": (3, 3)}, ConfigError, "sums to 6, but the model has 8 layers"),
        ({"max_model_len": 5000}, ConfigError, "exceeds the model's context of 1024"),
        ({"memory_limit_bytes": 1000}, CapacityError, "needs .* a rank, has 1000 B"),
        (
            {"memory_limit_bytes": 1000},
            CapacityError,
            "weights alone are 13.0 MiB, more than what 64 ranks",
        ),
        (
            {"max_num_seqs": 10**8, "memory_limit_bytes": 10**9},
            CapacityError,
            "lower .* max_num_seqs",
        ),
        ({"device": "cuda"}, ConfigError, "torch sees no CUDA device"),
        ({"devices": (0,), "device": "cpu"}, ConfigError, "goes with device cuda"),
        ({"tensor_parallel_size": "wide"}, ConfigError, "neither a number nor 'auto'"),
        ({"max_num_seqs": "8"}, ConfigError, "max_num_seqs='8' must be a whole number"),
        ({"tensor_paralel_size": 2}, ConfigError, "the closest one is tensor_parallel_size"),
    ],
)
def test_what_cannot_work_is_refused_before_any_process_starts(
    settings: dict[str, object], error: type[Exception], says: str
) -> None:
    import torch

    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(error, match=says):
        LLM("demo", **settings)  # type: ignore[arg-type]


def test_prompts_that_cannot_be_served_are_refused(pool: WorkerPool) -> None:
    llm = LLM("demo", pool=pool)
    for prompts, says in (
        ([[]], "prompt 0 is empty"),
        ([""], "prompt 0 is empty; give at least one character"),
        (["x", "\ud800"], "prompt 1 holds half of a surrogate pair"),
        ([[5], [2048]], "prompt 1 holds the token id 2048; ids go from 0 to 2047"),
        (
            [[1] * 1020],
            "has 1020 tokens and asks for 24 more; the context holds 1024, so ask for at most 4",
        ),
    ):
        with pytest.raises(RequestError, match=says):
            llm.generate(prompts, GREEDY)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="2 sampling_params for 1 prompts"):
        llm.generate([[5]], [GREEDY, GREEDY])


def test_a_second_stream_is_refused_while_the_first_has_not_ended(pool: WorkerPool) -> None:
    """Their tokens would mix; a stream that is closed or dropped makes room."""
    with LLM("demo", dtype="float32", pool=pool) as llm:
        alone = llm.generate([[5, 6, 7]], GREEDY)[0].outputs[0].token_ids
        first = llm.stream([[8, 9]], GREEDY)
        next(first)
        with pytest.raises(EngineError, match="has not ended; take or close it first"):
            llm.generate([[5, 6, 7]], GREEDY)
        first.close()
        assert llm.generate([[5, 6, 7]], GREEDY)[0].outputs[0].token_ids == alone


@pytest.mark.parametrize("prompts", [{"prompt": "x"}, [{"prompt": "x"}], None, 5])
def test_prompts_that_are_neither_texts_nor_ids_are_refused(prompts: object) -> None:
    with pytest.raises(RequestError, match="texts or lists of token ids"):
        LLM("demo").generate(prompts)  # type: ignore[arg-type]


def test_ids_that_are_no_integers_are_refused(pool: WorkerPool) -> None:
    with pytest.raises(RequestError, match="holds the token id True"):
        LLM("demo", pool=pool).generate([[True, 1]], GREEDY)


@pytest.mark.parametrize("prompts", [b"abc", [b"abc"], [bytearray(b"abc")]])
def test_bytes_are_neither_text_nor_ids(pool: WorkerPool, prompts: Any) -> None:
    with pytest.raises(RequestError, match="texts or lists of token ids"):
        LLM("demo", pool=pool).generate(prompts)


@pytest.mark.parametrize("params", [{"temperature": 0}, ["greedy"], 3])
def test_sampling_params_of_another_type_are_refused(pool: WorkerPool, params: Any) -> None:
    with pytest.raises(RequestError, match="give a SamplingParams"):
        LLM("demo", pool=pool).generate(["a"], params)


def test_a_prompt_that_fills_the_context_is_to_be_shortened(pool: WorkerPool) -> None:
    with pytest.raises(RequestError, match="1024 tokens; the context holds 1024, so shorten it to"):
        LLM("demo", pool=pool).generate([[5] * 1024])


def test_leaving_a_model_ends_the_stream_that_is_still_held(pool: WorkerPool) -> None:
    with LLM("demo", pool=pool) as llm:
        stream = llm.stream([[5, 6]], SamplingParams(max_tokens=500, ignore_eos=True))
        next(stream)
    assert list(stream) == []


HELD = """
from bireme import LLM, SamplingParams
{enter}
stream = llm.stream([[5, 6]], SamplingParams(max_tokens=500, ignore_eos=True))
next(stream)
raise LookupError("the caller's own")
"""


@pytest.mark.parametrize("enter", ["llm = LLM('demo')", "llm = LLM('demo').__enter__()"])
def test_a_callers_error_amid_a_stream_is_the_only_one_that_is_shown(enter: str) -> None:
    command = [sys.executable, "-c", HELD.format(enter=enter)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.endswith("LookupError: the caller's own\n")


def test_what_is_recorded_is_of_this_model_alone(pool: WorkerPool) -> None:
    """Its ranks were another's before, and wrote the same rings."""
    params = SamplingParams(temperature=0, max_tokens=3)
    for layout in ({"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}):
        with LLM("demo", pool=pool, **layout) as llm:
            llm.generate([[5, 6, 7]], params)
            recorded = llm.recorded()
    kinds = {span.kind for rank in recorded.ranks for span in rank.spans}
    assert SpanKind.SEND in kinds
    assert SpanKind.ALL_REDUCE not in kinds
